"""How sure a plan's performance is, as `plan.json` tells it (`costmodel.confidence`)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["BasisShares", "Confidence", "Part", "WeakestPart"]


class Part(BaseModel):
    """Every part refuses keys that it does not know, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BasisShares(Part):
    """Shares of an average step's time by what its prices rest on; they sum to 1."""

    measured: float
    fitted: float
    derived: float
    assumed: float


class WeakestPart(Part):
    """The part of a step that widens the band most."""

    name: str
    """A calibration section, or host time."""
    kind: str
    error_share: float
    """Of the variance that the parts of a step cause."""
    source: str
    advice: str
    """What to run to improve it."""


class Confidence(Part):
    """How sure the performance is: its basis, and bands that hold `level` of true values."""

    level: float
    basis: BasisShares
    output_tokens_per_s_low: float
    output_tokens_per_s_high: float
    tpot_low_s: float
    tpot_high_s: float
    weakest: WeakestPart
