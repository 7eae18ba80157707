"""What the cost model says about measured operators, and what physics allows them.

A measurement is priced by the formula that prices it in a step, with weights that no cache holds
(profiled networks stream them, `shardplan profile` sees to it). No kernel beats

    max(FLOP / peak of its unit, bytes that it must read / L2 rate)

with the FLOP of the product or of the causal half of the scores, and the bytes of weights, cached
keys and values, or streamed elements: L2, since a benchmark may find them there. A file whose
kernels are faster was written in another unit or on another device. Collectives have no such
bound here (they are held against the model's own price only).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from shardplan.costmodel.calibration import Calibration
from shardplan.costmodel.errors import DataFileError
from shardplan.costmodel.hardware import Cluster, Device
from shardplan.costmodel.kernels.attention import attention_decode, attention_prefill
from shardplan.costmodel.kernels.base import Array, KernelTime, Machine
from shardplan.costmodel.kernels.collectives import (
    CollectiveKind,
    collective,
    collective_section,
)
from shardplan.costmodel.kernels.matmul import MATMUL_FAMILY, matmul
from shardplan.costmodel.kernels.mla import mla_decode
from shardplan.costmodel.kernels.moe import MOE_FAMILY, grouped_matmul, moe_block
from shardplan.costmodel.kernels.pointwise import pointwise
from shardplan.costmodel.kernels.precision import lenders, peak_flop_per_s, precision_of
from shardplan.costmodel.placement import group_tiers
from shardplan.costmodel.profiler_files.measurement import Measurement
from shardplan.costmodel.profiler_files.recognise import bytes_per_element
from shardplan.models.errors import InputError

__all__ = ["COLLECTIVES", "Priced", "check_plausible", "price_measured"]

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_LATENT, _ROPE = 512, 64
"""DeepSeek's latent and rotary parts (config.json: kv_lora_rank, qk_rope_head_dim)."""
_FASTER = 0.9
"""Peaks of data sheets are taken to be right to a tenth."""
_WRONG_UNIT = 100.0
Sizes = Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """Measured operators of one calibration section with the model's parts of their time."""

    section: str
    measured: tuple[Measurement, ...]
    body_s: Array
    overhead_s: Array
    bound_s: Array

    @property
    def seconds(self) -> Array:
        """Measured times, `[rows]`."""
        return np.asarray([one.seconds for one in self.measured], dtype=np.float64)

    @property
    def total_s(self) -> Array:
        """The model's times, `[rows]`."""
        return self.body_s + self.overhead_s


_FAMILIES = {"matmul": MATMUL_FAMILY, "grouped_matmul": MOE_FAMILY, "moe": MOE_FAMILY}
_SECTIONS = {
    "attention_prefill": "attention.prefill",
    "attention_decode": "attention.decode",
    "mla_decode": "mla.decode",
}


def _section(calibration: Calibration, one: Measurement) -> str:
    """The section whose coefficients price it: a dtype that has none shares its lender's."""
    if one.op in _FAMILIES:
        names = lenders(calibration, _FAMILIES[one.op], precision_of(one.dtype))
        return next(name for name in names if calibration.section(name).coefficients)
    name = _SECTIONS.get(one.op, f"pointwise.{one.op}")
    return calibration.section(name).name


def price_measured(
    device: Device,
    cluster: Cluster | None,
    measured: Sequence[Measurement],
    engine: str = "",
) -> tuple[list[Priced], dict[str, list[Measurement]]]:
    """Priced operators by section, and those that the device or its calibration does not price.

    `cluster` prices collectives; without one they are among the latter, by reason. `engine`: the
    engine profile whose own kernels were measured.
    """
    machine = Machine.of(device, engine)
    groups: dict[tuple[object, ...], list[Measurement]] = {}
    for one in measured:
        ranks = one.size("ranks") if one.op in COLLECTIVES else 0.0
        key = (one.op, one.dtype, one.launch, ranks)
        groups.setdefault(key, []).append(one)
    parts: dict[str, list[Priced]] = {}
    refused: dict[str, list[Measurement]] = {}
    for group in groups.values():
        try:
            found = _price(machine, cluster, group)
        except InputError as error:
            refused.setdefault(error.rule, []).extend(group)
        else:
            parts.setdefault(found.section, []).append(found)
    return [_joined(name, found) for name, found in parts.items()], refused


def _joined(section: str, parts: Sequence[Priced]) -> Priced:
    return Priced(
        section=section,
        measured=tuple(one for part in parts for one in part.measured),
        body_s=np.concatenate([part.body_s for part in parts]),
        overhead_s=np.concatenate([part.overhead_s for part in parts]),
        bound_s=np.concatenate([part.bound_s for part in parts]),
    )


def _price(machine: Machine, cluster: Cluster | None, group: Sequence[Measurement]) -> Priced:
    first = group[0]
    names = [name for name, _ in first.sizes]
    sizes = {n: np.asarray([one.size(n) for one in group], dtype=np.float64) for n in names}
    if first.op in COLLECTIVES:
        section, time = _price_collective(machine, cluster, first, sizes)
        bound = np.zeros(len(group))
    else:
        section = _section(machine.calibration, first)
        time = _FORMULAS.get(first.op, _pointwise)(machine, first, sizes)
        bound = _bound_s(machine.device, first, sizes)
    return Priced(
        section=section,
        measured=tuple(group),
        body_s=time.compute_s + time.memory_s,
        overhead_s=np.asarray(time.overhead_s, dtype=np.float64),
        bound_s=bound,
    )


def _price_collective(
    machine: Machine, cluster: Cluster | None, first: Measurement, sizes: Sizes
) -> tuple[str, KernelTime]:
    if cluster is None:
        raise InputError("collectives need the cluster they ran on", hint="give --cluster")
    kind = cast("CollectiveKind", first.op)
    spans = group_tiers(cluster, group=int(first.size("ranks")), stride=1)
    if not spans:
        raise InputError("a collective needs two ranks or more", got="ranks=1")
    section = collective_section(kind, spans, machine.calibration, first.launch)
    together = first.size("ranks") if kind == "all_to_all" else 1.0
    message = sizes["message_bytes"] * together
    time = collective(kind, spans, message, machine.calibration, launch=first.launch)
    return section, time


def _matmul(machine: Machine, one: Measurement, s: Sizes) -> KernelTime:
    return matmul(machine, s["m"], s["n"], s["k"], one.dtype, weights="cold")


def _grouped(machine: Machine, one: Measurement, s: Sizes) -> KernelTime:
    return grouped_matmul(machine, s["rows"], s["groups"], s["n"], s["k"], one.dtype)


def _moe(machine: Machine, one: Measurement, s: Sizes) -> KernelTime:
    return moe_block(
        machine, s["tokens"], s["hidden"], s["ffn"], s["experts"], s["topk"], s["ep"], one.dtype
    )


def _prefill(machine: Machine, _one: Measurement, s: Sizes) -> KernelTime:
    return attention_prefill(
        machine,
        s["batch"],
        s["tokens"],
        0.0,
        s["heads"],
        s["kv_heads"],
        s["head_dim"],
        kernel="flash",
        kv_dtype="bf16",
    )


def _decode(machine: Machine, _one: Measurement, s: Sizes) -> KernelTime:
    return attention_decode(
        machine,
        s["batch"],
        s["tokens"],
        s["heads"],
        s["kv_heads"],
        s["head_dim"],
        kernel="flash",
        kv_dtype="bf16",
    )


def _mla_decode(machine: Machine, _one: Measurement, s: Sizes) -> KernelTime:
    return mla_decode(
        machine,
        s["batch"],
        s["tokens"],
        s["heads"],
        _LATENT,
        _ROPE,
        kernel="flash",
        kv_dtype="bf16",
    )


def _pointwise(machine: Machine, one: Measurement, s: Sizes) -> KernelTime:
    moved = s["elements"] * bytes_per_element(one.op)
    return pointwise(machine, one.op, s["elements"], moved)


_FORMULAS: Mapping[str, Callable[[Machine, Measurement, Sizes], KernelTime]] = {
    "matmul": _matmul,
    "grouped_matmul": _grouped,
    "moe": _moe,
    "attention_prefill": _prefill,
    "attention_decode": _decode,
    "mla_decode": _mla_decode,
}


def _bound_s(device: Device, one: Measurement, s: Sizes) -> Array:
    """Seconds that no kernel of these sizes can beat, `[rows]`."""
    none = np.zeros(1)
    flop, moved, rule = none, none, precision_of("bf16")
    if one.op == "matmul":
        rule = precision_of(one.dtype)
        flop, moved = 2.0 * s["m"] * s["n"] * s["k"], s["n"] * s["k"] * rule.weight_bytes
    elif one.op == "grouped_matmul":
        rule = precision_of(one.dtype)
        flop = 2.0 * s["rows"] * s["n"] * s["k"]
    elif one.op == "moe":
        rule = precision_of(one.dtype)
        flop = 6.0 * s["tokens"] * s["topk"] / s["ep"] * s["hidden"] * s["ffn"]
    elif one.op == "attention_prefill":
        flop = 2.0 * s["batch"] * s["heads"] * s["tokens"] ** 2 * s["head_dim"]
    elif one.op == "attention_decode":
        moved = 4.0 * s["batch"] * s["kv_heads"] * s["tokens"] * s["head_dim"]
    elif one.op == "mla_decode":
        moved = 2.0 * s["batch"] * s["tokens"] * (_LATENT + _ROPE)
    else:
        moved = s["elements"] * bytes_per_element(one.op)
    bound = np.maximum(flop / peak_flop_per_s(device, rule), moved / device.l2_bytes_per_s)
    return np.asarray(bound, dtype=np.float64)


def check_plausible(device: Device, priced: Sequence[Priced]) -> None:
    """`DataFileError` for times that the device cannot reach, or a file in another unit."""
    ratios: dict[str, list[float]] = {}
    for part in priced:
        too_fast = np.flatnonzero(part.seconds < _FASTER * part.bound_s)
        if too_fast.size:
            row = int(too_fast[0])
            one = part.measured[row]
            raise DataFileError(
                f"a kernel must not be faster than {device.name} can be at its peak",
                got=f"{one.where}: {one.kernel} {one.seconds * 1e6:.4g} us, "
                f"the bound is {part.bound_s[row] * 1e6:.4g} us",
                hint="are the durations in ms, or from another device?",
            )
        for one, ratio in zip(part.measured, part.seconds / part.total_s, strict=True):
            ratios.setdefault(one.file, []).append(float(ratio))
    for file, found in ratios.items():
        for far, word in ((min(found), "slower"), (1.0 / max(found), "faster")):
            if far > _WRONG_UNIT:
                raise DataFileError(
                    f"every kernel is over {_WRONG_UNIT:g} times {word} than the device should be",
                    got=f"{file}: {len(found)} shapes, {far:.3g} times at least",
                    hint="are the durations in us, and from this device?",
                )
