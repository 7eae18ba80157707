"""What `shardplan lint` says, as data."""

from __future__ import annotations

from typing import Literal

from shardplan.search.plan import MemoryRow, Performance, StrategyInfo, Workload
from shardplan.search.plan_confidence import Part

__all__ = ["Best", "Finding", "LintReport"]


class Finding(Part):
    """One thing to say about a configuration."""

    level: Literal["error", "warning", "note"]
    rule: str
    """Id of a rule of `data/rules.toml`, or a word for what was checked; "" for a note."""
    sentence: str
    source: str
    got: str
    hint: str


class Best(Part):
    """The best plan of the same question."""

    strategy: StrategyInfo
    performance: Performance
    gain: float | None
    """Its output tokens a second over the configuration's."""
    gap: float | None


class LintReport(Part):
    """A configuration judged.

    Without `performance` it could not be priced, and errors say why; or it is an instance of a
    pool, whose speed a note tells.
    """

    source: str
    model: str
    layout: str
    cluster: str
    device: str
    engine_profile: str
    workload: Workload | None
    findings: tuple[Finding, ...]
    strategy: StrategyInfo | None = None
    slots: int | None = None
    """Sequences of a dp group that fit, at most the configured ones."""
    performance: Performance | None = None
    memory: tuple[MemoryRow, ...] = ()
    lever: str = ""
    best: Best | None = None

    @property
    def runs(self) -> bool:
        """Whether nothing says that it cannot run."""
        return all(one.level != "error" for one in self.findings)
