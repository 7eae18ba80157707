"""Which points of a grid this machine can run, in which mode and by which backend.

Left out: what does not fit in half of the free memory, int8 where the device has no operator for
it, dtypes of torch.compile's kernels on an npu (torch_npu has fused operators of its own).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shardplan.models.errors import InputError, UnknownNameError
from shardplan.search.profiling.backend import Target
from shardplan.search.profiling.points import COLLECTIVES, OPERATORS, Point

__all__ = ["chosen_ops", "collective_points", "group_sizes", "operator_points"]

_MEMORY_SHARE = 0.5
_INT_MM_ROWS = 17
"""torch._int_mm of cuda refuses fewer rows."""
_GROUPED_CAPABILITY = (9, 0)
_CUDNN_CAPABILITIES = ((9, 0), (10, 0))
_CUDNN_VERSION = 91500
"""From here on PyTorch prefers cuDNN's attention on Hopper and Blackwell (seen with 9.19: both
take the same time)."""


def chosen_ops(given: str | None, world: int) -> tuple[str, ...]:
    """Operators of `--ops`; without it all collectives under torchrun, else all operators.

    Raises `UnknownNameError`, and `InputError` for a collective without other ranks.
    """
    if given is None:
        return COLLECTIVES if world > 1 else OPERATORS
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    for name in names or ("",):
        if name not in (*OPERATORS, *COLLECTIVES):
            raise UnknownNameError("operator to measure", name, (*OPERATORS, *COLLECTIVES))
    if world == 1 and set(names) & set(COLLECTIVES):
        raise InputError(
            "a collective needs two ranks or more",
            got="one process",
            hint="torchrun --nproc-per-node 2 --no-python shardplan profile ...",
        )
    if world > 1 and set(names) & set(OPERATORS):
        raise InputError(
            "under torchrun only collectives are measured",
            got=f"--ops {','.join(names)} with {world} ranks",
            hint=f"take {','.join(COLLECTIVES)}, or run without torchrun",
        )
    return names


def _grouped(target: Target) -> bool:
    torch = target.torch
    has = hasattr(torch.nn.functional, "grouped_mm") or hasattr(torch, "_grouped_mm")
    return bool(has and target.runtime.get_device_capability() >= _GROUPED_CAPABILITY)


def _attention_backend(target: Target, point: Point) -> str:
    """The kernel that the grid names, or that PyTorch picks here."""
    if target.kind != "cuda":
        return "sdpa"
    if point.backend:
        return point.backend
    hopper = target.runtime.get_device_capability() in _CUDNN_CAPABILITIES
    version = target.torch.backends.cudnn.version() or 0
    return "sdpa_cudnn" if hopper and version >= _CUDNN_VERSION else "sdpa_flash"


def _backend(target: Target, point: Point) -> str | None:
    """What runs the point here; None where nothing does."""
    npu, cuda = target.kind == "npu", target.kind == "cuda"
    if point.op == "matmul":
        if point.dtype != "int8":
            return "linear"
        if npu:
            return "torch_npu"
        return "int_mm" if not cuda or point.m >= _INT_MM_ROWS else None
    if point.dtype == "int8":
        return None
    if point.op.startswith("attention"):
        return _attention_backend(target, point)
    if point.op == "moe":
        if npu:
            return "torch_npu"
        return (
            "grouped_mm" if cuda and point.dtype == "bf16" and _grouped(target) else "expert_loop"
        )
    if point.op == "copy" or point.backend in ("", "torch"):
        return "torch"
    if point.backend != "fused":
        raise UnknownNameError("backend of a grid", point.backend, ("torch", "fused"))
    if npu:
        return None if point.op in ("rope", "qk_norm_rope") else "torch_npu"
    return "inductor"


def operator_points(target: Target, grid: Iterable[Point], ops: Sequence[str]) -> list[Point]:
    """Points of the operators that this device can run."""
    mode = "graph" if target.graphs else "eager"
    room = _MEMORY_SHARE * target.memory_bytes
    found = []
    for point in grid:
        if point.op not in ops or point.op in COLLECTIVES or point.tensor_bytes() > room:
            continue
        backend = _backend(target, point)
        if backend is not None:
            found.append(replace(point, mode=mode, backend=backend))
    return found


def group_sizes(world: int) -> tuple[int, ...]:
    """Ranks of the groups measured: powers of two from 2, and all ranks."""
    powers = [2**at for at in range(1, world.bit_length()) if 2**at <= world]
    return tuple(sorted({*powers, world} - {1}))


def collective_points(
    target: Target, grid: Iterable[Point], ops: Sequence[str], world: int, backend: str
) -> list[Point]:
    """Points of the collectives over every group size, host-launched and, where it is, captured."""
    modes = ("graph", "eager") if target.graphs and backend != "gloo" else ("eager",)
    room = _MEMORY_SHARE * target.memory_bytes
    return [
        replace(point, ranks=ranks, mode=mode, backend=backend)
        for point in grid
        if point.op in ops and point.op in COLLECTIVES and point.tensor_bytes() <= room
        for ranks in group_sizes(world)
        if point.message_bytes % (ranks * ranks * 2) == 0
        for mode in modes
    ]
