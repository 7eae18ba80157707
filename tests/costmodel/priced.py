"""Priced layouts for tests: a preset under a strategy on a shipped cluster, ready to be asked."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import EngineProfile, load_engine
from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.optable import Row
from shardplan.costmodel.step import StepModel
from shardplan.models.apply import ShardedGraph, apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec

__all__ = ["CASES", "PHASES", "Priced", "case_names", "load", "price"]

PHASES: tuple[Phase, ...] = ("prefill", "decode")
CLUSTER, ENGINE = "atlas-800i-a3", "vllm-ascend"

CASES: Mapping[str, tuple[str, Parallelism]] = {
    "dense tp1": ("llama-3.1-8b", Parallelism()),
    "dense tp8": ("llama-3.1-8b", Parallelism(tp=8)),
    "dense tp2 pp3": ("llama-3.1-8b", Parallelism(tp=2, pp=3)),
    "dense dp2 tp4": ("llama-3.1-70b", Parallelism(tp=4, dp=2)),
    "dense tp8 sp": ("llama-3.1-70b", Parallelism(tp=8, sp=True)),
    "dense pp4 uneven": ("llama-2-13b", Parallelism(pp=4, stage_layers=(9, 11, 11, 9))),
    "tp beyond kv heads": ("qwen3-30b-a3b", Parallelism(tp=16)),
    "qk norm tp4": ("qwen3-32b", Parallelism(tp=4)),
    "tied": ("qwen3-0.6b", Parallelism(tp=2, pp=2)),
    "moe dp4 tp2 ep8": ("qwen3-30b-a3b", Parallelism(tp=2, dp=4, ep=8)),
    "moe dp4 tp2 ep8 a2a": (
        "qwen3-30b-a3b",
        Parallelism(tp=2, dp=4, ep=8, exchange="alltoall"),
    ),
    "moe tp4 ep4": ("mixtral-8x7b", Parallelism(tp=4, ep=4)),
    "shared experts tp8": ("glm-4.5", Parallelism(tp=8, pp=2)),
    "mla tp8": ("deepseek-v3", Parallelism(tp=8, pp=2)),
    "mla dp16 ep16 a2a": ("deepseek-v3", Parallelism(dp=16, ep=16, exchange="alltoall")),
    "mla lite tp4 sp": ("deepseek-v2-lite", Parallelism(tp=4, sp=True)),
    "dense tp2 cp4": ("llama-3.1-8b", Parallelism(tp=2, cp=4)),
    "dense tp2 cp2 pp2 sp": ("llama-3.1-8b", Parallelism(tp=2, cp=2, pp=2, sp=True)),
    "moe tp2 cp4 ep4": ("qwen3-30b-a3b", Parallelism(tp=2, cp=4, ep=4)),
    "mla tp2 cp2 dp4 ep16 a2a": (
        "deepseek-v3",
        Parallelism(tp=2, cp=2, dp=4, ep=16, exchange="alltoall"),
    ),
    "modules over dp16": (
        "deepseek-v3",
        Parallelism(dp=16, ep=16, exchange="alltoall", o_tp=8, ffn_tp=4, head_tp=16, embed_tp=16),
    ),
    "modules whole and wide": (
        "glm-4.5",
        Parallelism(tp=4, dp=2, sp=True, shared_tp=1, head_tp=8, o_tp=8, embed_tp=1),
    ),
}
"""One line for each way of splitting that a served model meets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """One layout with its op tables and its ledger."""

    model: StepModel
    ledger: Ledger

    @property
    def graphs(self) -> Mapping[Phase, ShardedGraph]:
        """The applied graphs."""
        return self.model.graphs

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.model.graphs["decode"].model.spec

    def rows(self, phase: Phase, block: str) -> tuple[Row, ...]:
        """The op table of one template."""
        return self.model.rows[phase][block]


def price(
    spec: ModelSpec,
    par: Parallelism,
    cluster: str = CLUSTER,
    engine: str | EngineProfile = ENGINE,
) -> Priced:
    """A model under a strategy, on a cluster with nodes enough for it."""
    machines = load_cluster(cluster, cards=par.ranks)
    profile = engine if isinstance(engine, EngineProfile) else load_engine(engine)
    graphs: dict[Phase, ShardedGraph] = {
        phase: apply(build_graph(spec, phase, mtp=par.mtp > 0), par) for phase in PHASES
    }
    return Priced(
        model=StepModel.of(graphs, machines, profile),
        ledger=Ledger.of(graphs["prefill"], machines.device, profile),
    )


@functools.lru_cache(maxsize=256)
def load(name: str, cluster: str = CLUSTER, engine: str = ENGINE) -> Priced:
    """One of `CASES`, or a preset on one rank."""
    preset, par = CASES.get(name, (name, Parallelism()))
    return price(load_model(preset), par, cluster, engine)


def case_names() -> st.SearchStrategy[str]:
    """Draws one of `CASES`."""
    return st.sampled_from(sorted(CASES))
