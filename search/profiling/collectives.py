"""Collectives over 2..N ranks, one process a rank, as torchrun starts them.

`message_bytes` is the full tensor, as in `shardplan.costmodel.kernels.collectives`. Of p ranks and
n bytes:

    collective      a rank gives      a rank gets
    all_reduce      n                 n (in place)
    all_gather      n / p             n
    reduce_scatter  n                 n / p
    all_to_all      n / p             n / p, a p-th of it from each rank

Groups are the first r ranks; the others wait. The time of a point is the largest median and the
largest minimum of its ranks. eager = launched by the host, back to back; graph = captured once and
replayed (nccl, hccl).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardplan.models.errors import InputError
from shardplan.search.profiling.backend import Target
from shardplan.search.profiling.plan import group_sizes
from shardplan.search.profiling.points import Point, element_bytes
from shardplan.search.profiling.timing import Call, Timing, measure

__all__ = ["World", "join", "local_rank", "world_size"]

_BACKENDS: Mapping[str, str] = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}
_RENAMED = (
    ("all_gather_single", "all_gather_into_tensor"),
    ("reduce_scatter_single", "reduce_scatter_tensor"),
)
"""Names of PyTorch 2.13 and those of before."""
_REPEATS = 15
_SHORT_BYTES = 2**20
_SHORT_CALLS, _LONG_CALLS = 20, 5


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError("torchrun sets whole numbers", got=f"{name}={text!r}")
    return int(text)


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return max(1, _environment("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's device on its host."""
    return _environment("LOCAL_RANK", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks of a run."""

    target: Target
    rank: int
    size: int
    backend: str
    groups: Mapping[int, Any]
    """Group of the first r ranks, by r."""
    control: Any
    """All ranks, on the host: agreement and waiting."""

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        self.target.torch.distributed.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def largest(self, values: list[float]) -> list[float]:
        """The largest of each value over all ranks; every rank waits for the others."""
        torch = self.target.torch
        shared = torch.tensor(values, dtype=torch.float64)
        distributed = torch.distributed
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX, group=self.control)
        return [float(value) for value in shared.tolist()]

    def measure(self, point: Point) -> Timing:
        """Time of a collective; every rank of the world calls this. `RuntimeError` on failure."""
        mine, problem = Timing(0.0, 0.0, _REPEATS), ""
        if self.rank < point.ranks:
            try:
                calls = [_call(self.target, point, self.groups[point.ranks])]
                count = _SHORT_CALLS if point.message_bytes <= _SHORT_BYTES else _LONG_CALLS
                mine = measure(self.target, calls, point.mode, count=count, repeats=_REPEATS)
            except RuntimeError as error:
                problem = str(error) or type(error).__name__
        median_s, min_s, failed = self.largest([mine.median_s, mine.min_s, float(bool(problem))])
        if failed:
            raise RuntimeError(problem or "another rank failed")
        return Timing(median_s, min_s, _REPEATS)

    def leave(self) -> None:
        """End the group of processes."""
        self.target.torch.distributed.destroy_process_group()


def join(target: Target) -> World:
    """Meet the other processes that torchrun started."""
    distributed = target.torch.distributed
    backend, size = _BACKENDS[target.kind], world_size()
    if "MASTER_ADDR" not in os.environ:
        raise InputError("several ranks are started by torchrun", got=f"WORLD_SIZE={size} alone")
    distributed.init_process_group(backend)
    groups = {ranks: distributed.new_group(list(range(ranks))) for ranks in group_sizes(size)}
    return World(
        target=target,
        rank=distributed.get_rank(),
        size=size,
        backend=backend,
        groups=groups,
        control=distributed.new_group(backend="gloo"),
    )


def _call(target: Target, point: Point, group: Any) -> Call:
    """One collective on tensors of its own."""
    torch = target.torch
    distributed = torch.distributed
    elements = point.message_bytes // element_bytes(point.dtype)
    part = elements // point.ranks
    new = functools.partial(torch.rand, device=target.place, dtype=target.dtype(point.dtype))
    gather, scatter = (
        getattr(distributed, new_name, None) or getattr(distributed, old_name)
        for new_name, old_name in _RENAMED
    )
    calls: Mapping[str, Callable[[], Call]] = {
        "all_reduce": lambda: functools.partial(distributed.all_reduce, new(elements), group=group),
        "all_gather": lambda: functools.partial(gather, new(elements), new(part), group=group),
        "reduce_scatter": lambda: functools.partial(scatter, new(part), new(elements), group=group),
        "all_to_all": lambda: functools.partial(
            distributed.all_to_all_single, new(part), new(part), group=group
        ),
    }
    return calls[point.op]()
