"""A serving configuration that a human wrote, in the words of this project.

A configuration comes from a `vllm serve` command or a script with such commands (`read_vllm`), or
from a MindIE `config.json` (`read_mindie`). It holds what bears on legality, memory and speed; None
where nothing was said and the engine's own default counts. What was read of a file but means
nothing here is kept in `unread`, so that nothing is passed over unseen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardplan.models.errors import InputError

__all__ = ["Configuration", "whole_number"]

_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One deployment of one model."""

    source: str
    """What it was read from: a command, a file."""
    engine_profile: str
    model: str = ""
    """A name, a path or a repository, as it stands; "" where a variable hides it."""
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    """Ranks that share the experts; 1 where tp splits them. `experts_parallel`: all ranks."""
    experts_parallel: bool = False
    cp: int = 1
    sp: bool = False
    exchange: str = "allgather"
    mtp: int = 0
    max_num_seqs: int | None = None
    """Sequences of one dp group."""
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    memory_fraction: float | None = None
    block_size: int | None = None
    quantized: bool | None = None
    """The checkpoint is one that was quantized for this engine; of which type its name may say."""
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    weight_prefetch: bool = False
    fused_collectives: bool = False
    role: str = "mixed"
    """mixed, or prefill or decode of a disaggregated deployment."""
    ranks: int | None = None
    """NPUs that the file itself says it takes."""
    broken: tuple[tuple[str, str, str], ...] = ()
    """(sentence, values, hint) of the engine's own rules that the file breaks."""
    unread: tuple[str, ...] = field(default=())


def whole_number(name: str, value: object, *, least: int = 1) -> int:
    """The value of an option as a whole number; `InputError` for anything else."""
    text = str(value).strip()
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= _MOST:
        unset = text.startswith("$")
        raise InputError(
            f"`{name}` is a whole number from {least} to {_MOST:,}",
            got=f"{name}={text[:40]!r}",
            hint="give what the script is called with: --arguments" if unset else "",
        )
    return number
