"""The question that a plan answers, as `plan.json` holds it. Units are in the names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardplan.search.plan_confidence import Part

__all__ = ["Limits", "Request", "Workload"]


class Workload(Part):
    """What is asked of the deployment. Lengths in tokens of one request."""

    input_len: int = Field(ge=1)
    output_len: int = Field(ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    """Requests in flight over the whole deployment; None: as many as serve best."""
    request_rate: float | None = Field(default=None, gt=0)
    """Requests a second to be served; None: as many as possible."""
    prefix_hit: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the prompt tokens found in the prefix cache."""
    mtp_acceptance: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of tokens predicted ahead that are kept where those before them were; None: nothing is
    predicted ahead, or as the model's default."""


class Limits(Part):
    """Service level: most time to first token and time per output token, means and percentiles."""

    ttft_s: float | None = Field(default=None, gt=0)
    tpot_s: float | None = Field(default=None, gt=0)
    ttft_p99_s: float | None = Field(default=None, gt=0)
    tpot_p99_s: float | None = Field(default=None, gt=0)

    @property
    def has_tails(self) -> bool:
        """Whether a 99th percentile is limited."""
        return self.ttft_p99_s is not None or self.tpot_p99_s is not None


class Request(Part):
    """The question, as asked, with every default filled in."""

    objective: Literal["throughput", "latency", "cards", "cost"]
    workload: Workload
    limits: Limits
    cards: int
    weight_dtype: str
    kv_dtype: str
    attention: str
    weight_prefetch: str = "off"
    """off, on or auto: searched both ways."""
    fused_collectives: str = "off"
    cp: str = "off"
    """Ranks that share a context: off, auto (any number) or one."""
    module_tp: str = "off"
    """auto: modules may be split over other ranks than tp."""
    only: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Sizes that axes may have, where the search was held to some (sp: 0 or 1)."""
    mtp: str = "off"
    """Tokens predicted ahead: off, auto (every depth of the engine is searched) or a depth."""
    collectives: str = "auto"
    """Algorithm between nodes: auto, all (searched) or a name."""
    engine: Literal["exact", "tpe", "nsga2", "nsga3", "cmaes", "gp", "random"]
    """Search engine."""
    engine_profile: str
    serving: Literal["agg", "disagg", "auto"]
    """Prefill and decode on the same cards, on pools of their own, or whichever is better."""
    prefill_cards: int | None = Field(default=None, ge=1)
    """Cards of the prefill pool, where it has a cluster of its own."""
    seed: int
    trials: int | None = None
    robust: bool = False
    """The least worst-case regret under the calibration's bands, in place of the best."""
    refine_simulated: int = Field(default=0, ge=0)
    """Best strategies that were simulated, to choose among them."""
    seed_trials: int = Field(default=0, ge=0)
    """Of these, how many come from a coarse exact pass."""
