"""What a price rests on: the kind of the calibration section behind each operator.

measured and fitted come from runs on the device (or its family), derived from the machine model
with another kernel's coefficients, assumed from a published constant or a guess that is said.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardplan.costmodel.calibration import Calibration

__all__ = ["basis_of"]

_ORDER = ("measured", "fitted", "derived", "assumed")


def _candidates(kind: str, weight_dtype: str, phase: str) -> Iterator[str]:
    """Section names that may stand behind a kind of operator, first choice first."""
    if kind in ("matmul", "grouped_matmul"):
        yield f"{'matmul' if kind == 'matmul' else 'moe'}.{weight_dtype}"
        yield f"matmul.{weight_dtype}"
    elif kind == "attention":
        yield f"attention.{phase}"
    elif kind in ("mla_attention", "mla_absorbed"):
        yield f"mla.{phase}"
    else:
        yield f"pointwise.{kind}"


def basis_of(calibration: Calibration, kind: str, weight_dtype: str, phase: str) -> str:
    """measured, fitted, derived or assumed; the weakest of a collective's sections."""
    for name in _candidates(kind, weight_dtype, phase):
        if name in calibration.sections:
            return calibration.sections[name].kind
    across = [s.kind for n, s in calibration.sections.items() if n.endswith(f".{kind}")]
    return max(across, key=_ORDER.index) if across else "derived"
