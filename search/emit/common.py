"""What every target needs: data tables, device families, placement on nodes, safe text.

Ranks are consecutive: group `g` of `n` ranks holds ranks `g*n` to `g*n + n - 1`, and rank `r`
is device `r mod p` of node `r div p` on nodes of `p` ranks. `placing` moves slots where a plan
numbers its ranks in another order.

Text from a plan reaches a shell only through `shlex.quote` and prose only through `printable`.
"""

from __future__ import annotations

import functools
import math
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from shardplan.costmodel.kernels.algorithms import AUTO
from shardplan.models.config_fields import plain
from shardplan.models.errors import InputError
from shardplan.models.parallel import AXES
from shardplan.search.families import device_family
from shardplan.search.plan import Plan

__all__ = [
    "MAX_RANKS",
    "Raw",
    "Slot",
    "algorithm_variable",
    "check_algorithm",
    "check_plan",
    "command_line",
    "family_of",
    "known_flags",
    "model_name",
    "place",
    "predicted",
    "printable",
    "refuse",
    "round_up",
    "table",
    "weights_folder",
]

_MAX_NAME = 64
MAX_RANKS = 2**16
_FOLDER = re.compile(r"/[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")


class Raw(str):
    """Text that goes into a script as it stands: our own shell expressions, never input."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Devices of one node: consecutive ones, unless `listed` names them."""

    node: int
    first: int
    ranks: int
    listed: tuple[int, ...] = ()

    @property
    def devices(self) -> Sequence[int]:
        """Device ids within the node."""
        return self.listed or range(self.first, self.first + self.ranks)


@functools.cache
def table(name: str) -> Mapping[str, Any]:
    """A shipped table of facts, `search/data/<name>.toml`."""
    text = files("shardplan.search").joinpath("data", f"{name}.toml").read_text("utf-8")
    return tomllib.loads(text)


def check_plan(plan: Plan) -> None:
    """`InputError` for sizes that no deployment has: a plan.json may come from anywhere."""
    way, cluster = plan.strategy, plan.cluster
    sizes = {name: getattr(way, name) for name in ("tp", "pp", "dp", "ep", "cp", "batch", "chunk")}
    sizes["ranks_per_node"] = cluster.ranks_per_node
    small = [f"{name}={size}" for name, size in sizes.items() if size < 1]
    if small:
        raise InputError("a size in a plan is 1 or more", got=", ".join(small))
    if way.ranks > min(cluster.ranks, MAX_RANKS):
        raise InputError(
            f"a strategy fits its cluster, and has at most {MAX_RANKS} ranks",
            got=f"ranks={way.ranks}, cluster={cluster.ranks}",
            hint="search again on this cluster",
        )
    if way.stage_layers and (len(way.stage_layers) != way.pp or min(way.stage_layers) < 1):
        raise InputError(
            "stage_layers holds one positive count a stage",
            got=f"stage_layers={way.stage_layers}, pp={way.pp}",
        )
    if sorted(way.order) != sorted(AXES):
        raise InputError("order names every axis once", got=f"order={'>'.join(way.order)}")
    _check_numbers(plan)


def _check_numbers(plan: Plan) -> None:
    """`InputError` for rates and memory sizes that are none, or beyond the card."""
    does, card = plan.performance, plan.cluster.hbm_bytes
    numbers = [does.concurrency, does.output_tokens_per_s, card]
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise InputError(
            "concurrency, rates and memory sizes in a plan are positive", got=str(numbers)
        )
    for row in plan.memory:
        parts = [number for number in row.model_dump().values() if isinstance(number, float)]
        if not all(math.isfinite(part) for part in parts) or not 0 < row.capacity_bytes <= card:
            raise InputError(
                "memory rows in a plan hold bytes, the capacity at most the card's",
                got=f"stage={row.stage}, capacity_bytes={row.capacity_bytes:g}, card={card:g}",
                hint="make the plan anew with `shardplan search`",
            )


def refuse(target: str, rule: str, *, got: str, hint: str) -> InputError:
    """The error of a plan that a target cannot express."""
    return InputError(f"{target} cannot express this plan: {rule}", got=got, hint=hint)


def check_algorithm(target: str, plan: Plan) -> None:
    """`InputError` for an algorithm between servers that HCCL has not on the plan's device."""
    if plan.strategy.collectives == AUTO:
        return
    from shardplan.search.algorithms import supported  # it prices collectives: numpy

    known = (AUTO, *supported(plan.cluster.soc_versions))
    if plan.strategy.collectives not in known:
        raise refuse(
            target,
            "HCCL has no such algorithm between servers of this device",
            got=f"collectives={printable(plan.strategy.collectives)}",
            hint="try " + ", ".join(known),
        )


def algorithm_variable(plan: Plan) -> dict[str, str]:
    """The variable that picks the algorithm between servers; empty where HCCL chooses."""
    if plan.strategy.collectives == AUTO:
        return {}
    from shardplan.search.algorithms import hccl_algo

    return {"HCCL_ALGO": hccl_algo(plan.strategy.collectives)}


def family_of(plan: Plan, target: str, families: Sequence[str], hint: str) -> str:
    """Family of the plan's device. `InputError` with `hint` for one outside `families`."""
    family = device_family(plan.cluster.soc_versions)
    if family is not None and family["name"] in families:
        return str(family["name"])
    title = "not an Ascend device" if family is None else family["title"]
    raise refuse(
        target,
        "the device is not supported",
        got=f"device={printable(plan.cluster.device)}, {title}",
        hint=hint,
    )


def place(target: str, *, groups: int, ranks: int, per_node: int) -> tuple[tuple[Slot, ...], ...]:
    """Slots of each of `groups` groups of `ranks` consecutive ranks, node by node.

    `InputError` unless a group fits inside one node or fills whole nodes.
    """
    if ranks > per_node and ranks % per_node:
        raise _straddles(target, ranks, per_node)
    nodes = -(-ranks // per_node)
    if nodes > 1:
        return tuple(
            tuple(Slot(node=g * nodes + n, first=0, ranks=per_node) for n in range(nodes))
            for g in range(groups)
        )
    starts = [divmod(g * ranks, per_node) for g in range(groups)]
    if any(first + ranks > per_node for _, first in starts):
        raise _straddles(target, ranks, per_node)
    return tuple((Slot(node=node, first=first, ranks=ranks),) for node, first in starts)


def _straddles(target: str, ranks: int, per_node: int) -> InputError:
    tries = [str(n) for n in range(1, per_node + 1) if per_node % n == 0]
    return refuse(
        target,
        "a group of ranks must fit inside one node or fill whole nodes",
        got=f"group={ranks}, ranks_per_node={per_node}",
        hint=f"try groups of {', '.join(tries)} or of whole nodes",
    )


def printable(text: str) -> str:
    """A name as prose: one line of letters, digits and ` ._:/@+,()=-`, at most 64 characters."""
    return re.sub(r"[^A-Za-z0-9 ._:/@+,()=-]", "_", plain(text))[:_MAX_NAME]


def model_name(plan: Plan) -> str:
    """The model's name with nothing in it that a shell, a path or JSON would read."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", plain(plan.model.name)).strip("-.")
    return word[:_MAX_NAME] or "model"


def weights_folder(plan: Plan, weights: str) -> str:
    """The checkpoint's folder on every node; `InputError` for one that is no plain path."""
    if not weights:
        return f"/data/{model_name(plan)}"
    if not _FOLDER.fullmatch(weights) or ".." in weights.split("/"):
        raise InputError(
            "`weights` is a folder from the root, of letters, digits and ._-",
            got=repr(weights[:100]),
            hint="for example weights=/data/llama",
        )
    return weights


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step


@functools.cache
def known_flags(data: str, command: str) -> frozenset[str]:
    """Flags of a command that a table holds."""
    return frozenset(
        name
        for group in table(data)["flags"]
        if group["command"] == command
        for key in ("names", "values", "switches")
        for name in group.get(key, ())
    )


def command_line(
    data: str, command: str, words: Sequence[str], flags: Iterable[tuple[str, str | None]]
) -> str:
    """A shell command, one flag a line, with every word quoted.

    `words` are what comes before the flags; a flag's value None makes it a switch; `Raw` stands
    as it is. `ValueError` for a flag that the target's table does not hold.
    """
    known = known_flags(data, command)
    lines = [" ".join(_word(word) for word in words)]
    for name, value in flags:
        if name not in known:
            raise ValueError(f"{name} is not in the flags of {data}.toml")
        if value is None:
            lines.append(name)
        elif command == "atc":
            lines.append(f"{name}={_word(value)}")
        else:
            lines.append(f"{name} {_word(value)}")
    return " \\\n  ".join(lines)


def _word(word: str) -> str:
    return str(word) if isinstance(word, Raw) else shlex.quote(word)


def predicted(plan: Plan) -> list[str]:
    """What the plan promises, as lines of a list."""
    work, does = plan.request.workload, plan.performance
    return [
        f"- requests of {work.input_len} input and {work.output_len} output tokens, "
        f"{does.concurrency:.0f} in flight",
        f"- time to first token {does.ttft_s * 1e3:.1f} ms, per output token "
        f"{does.tpot_s * 1e3:.2f} ms (means)",
        f"- {does.output_tokens_per_s:.0f} output tokens/s, {does.requests_per_s:.3f} requests/s",
    ]
