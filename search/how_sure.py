"""How sure a price is, for people: shares, a band, the weakest part, what to run to improve it."""

from __future__ import annotations

from typing import Any

from shardplan.costmodel.confidence import Cause, Confidence, level

__all__ = ["basis_words", "confidence_summary", "improve"]

_FAMILIES = ("matmul", "moe", "attention", "mla", "pointwise", "overlap")

_SHOWN = 0.005


def improve(cause: Cause, *, device: str, cluster: str) -> str:
    """What to run so that this cause rests on measurements of the machine, in one sentence."""
    family = cause.name.partition(".")[0]
    if family == "collectives":
        return (
            f"measure the collectives of {cluster} (hccl_test or nccl-tests) and give the output to"
            f" `shardplan calibrate --device {device} --cluster {cluster}`"
        )
    if family in _FAMILIES:
        return (
            f"run `shardplan profile` on one {device} and give its CSV to"
            f" `shardplan calibrate --device {device}`"
        )
    return (
        "measure the idle time of one step with the engine's profiler and set step_host_us in an"
        " engine profile, or anchor one measured step with `shardplan calibrate --anchor`"
    )


def basis_words(basis: dict[str, float]) -> str:
    """Shares of the time, the largest first; those that round to nothing are left out."""
    shares = sorted(basis.items(), key=lambda item: -item[1])
    return ", ".join(f"{share:.0%} {kind}" for kind, share in shares if share >= _SHOWN)


def confidence_summary(
    sure: Confidence, *, device: str, cluster: str, point: int = 0
) -> dict[str, Any]:
    """`low_factor` and `high_factor` over any time of the price, its basis and its weakest part."""
    cause, share = sure.weakest(point)
    return {
        "level": level(),
        "low_factor": float(sure.low[point]),
        "high_factor": float(sure.high[point]),
        "basis": {kind: float(share[point]) for kind, share in sure.basis.items()},
        "weakest": {
            "name": cause.name,
            "kind": cause.kind,
            "error_share": share,
            "source": cause.source,
            "advice": improve(cause, device=device, cluster=cluster),
        },
    }
