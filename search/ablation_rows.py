"""The tables of an ablation (`shardplan.search.ablation`): bytes, seconds and their rates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Ablation", "AblationRow", "AttentionRow", "LengthRow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationRow:
    """One step. Weights and cache are of all cards together, `fullest_bytes` of the fullest one;
    times are of one request."""

    step: str
    split: str
    fits: bool
    batch: int
    weights_bytes: float
    kv_cache_bytes: float
    fullest_bytes: float
    capacity_bytes: float
    ttft_s: float
    tpot_s: float
    end_to_end_s: float
    output_tokens_per_s: float
    speedup: float
    """End-to-end time of the baseline over this one's; throughput for the batching step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """Attention time of one prompt over all layers, naive against flash."""

    tokens: int
    naive_s: float
    flash_s: float
    gain: float
    prefill_gain: float
    """Of the whole prefill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRow:
    """Output length at which one request of a prompt takes `end_to_end_s`."""

    input_len: int
    output_len: int
    end_to_end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """The table of one model on one cluster."""

    model: str
    cluster: str
    device: str
    cards: int
    engine_profile: str
    input_len: int
    output_len: int
    rows: tuple[AblationRow, ...]
    attention: tuple[AttentionRow, ...]
    lengths: tuple[LengthRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
