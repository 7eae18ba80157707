"""The question as a user puts it, and the checks that need no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from shardplan.costmodel.hardware import Cluster
from shardplan.models.errors import InputError
from shardplan.models.spec import ModelSpec
from shardplan.search.layouts import Reach
from shardplan.search.only import only_of
from shardplan.search.workload import one_of, positive, shown, whole

__all__ = [
    "DEFAULT_TRIALS",
    "SWITCHES",
    "Asked",
    "check_words",
    "reach_of",
    "seed_trials_of",
    "time_limit_of",
]

Objective = Literal["throughput", "latency", "cards", "cost"]
SWITCHES = ("weight_prefetch", "fused_collectives")
SearchEngine = Literal["auto", "exact", "tpe", "nsga2", "nsga3", "cmaes", "gp", "random"]
DEFAULT_TRIALS = 200
DEFAULT_SEED_TRIALS = 8
_MOST_TRIALS = 10**7
_MOST_SEED_TRIALS = 1000
_MOST_SIMULATED = 256
_MOST_SEED = 2**32 - 1
_MOST_SECONDS = 1e7
_MOST_GRAPH_MIB = 65536.0
_MOST_GRAPHS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The question as a user puts it; None where nothing was said. Times in milliseconds."""

    model: str | ModelSpec
    cluster: str | Cluster
    nodes: int | None = None
    cards: int | None = None
    device: str | None = None
    input_len: int | None = None
    output_len: int | None = None
    concurrency: int | None = None
    rate: float | None = None
    prefix_hit: float | None = None
    workload: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    ttft_p99_ms: float | None = None
    tpot_p99_ms: float | None = None
    objective: str = "throughput"
    weight_dtype: str = "auto"
    kv_dtype: str = "auto"
    attention: str = "auto"
    engine: str = "auto"
    trials: int | None = None
    time_limit: float | None = None
    """Seconds after which the exact engine stops with the best so far and its gap."""
    seed: int = 0
    seed_trials: int | None = None
    engine_profile: str | None = None
    serving: str = "agg"
    prefill_cluster: str | Cluster | None = None
    """Where prefill instances run; None: on `cluster`, beside the others. `serving`: not agg."""
    prefill_nodes: int | None = None
    prefill_cards: int | None = None
    prefill_device: str | None = None
    weight_prefetch: str | None = None
    """off, on or auto (searched both ways); None: as the engine has it."""
    fused_collectives: str | None = None
    mtp: str | int = "off"
    """Tokens to predict ahead: off, auto (every depth of the engine is searched) or a depth."""
    mtp_acceptance: float | None = None
    cp: str | int = "off"
    """Ranks that share a context: off, auto (any number) or one."""
    module_tp: str = "off"
    """auto: modules may be split over other ranks than tp (`search.layouts`)."""
    only: Mapping[str, int | Sequence[int]] | Sequence[str] | None = None
    """Sizes that axes may have: {"tp": (4, 8), "pp": 1}, or words such as "tp=4,8"."""
    collectives: str = "auto"
    """Algorithm between nodes: auto (the library's pick), all (searched) or a name."""
    robust: bool = False
    refine_simulated: int | None = None
    """Best strategies to simulate with the workload, to choose among them."""
    card_price: float | None = None
    """Of an hour of a card: any currency, or its power in kW."""
    prefill_card_price: float | None = None
    """The same of the prefill pool's own cluster."""
    spare: int | None = None
    """Cards or nodes that may be lost while the rate is still served within the limits."""
    spare_unit: str = "card"
    """What `spare` counts: card or node."""
    losses: bool = False
    """What is left when a card or a node is lost (`search.capacity`)."""
    auto_batching: bool = False
    """Graph sizes and what the step sizes gain (`search.batching`)."""
    lengths: str | None = None
    """File of lengths that they are made for; with it they are made in any case."""
    graph_mib: float | None = None
    """Memory of a graph; None: the engine's."""
    max_graphs: int | None = None
    """Graphs of a phase at most; None: as many as memory and its worth allow."""

    @property
    def batched(self) -> bool:
        """Whether graph sizes are asked for."""
        return self.auto_batching or self.lengths is not None

    @property
    def sized(self) -> bool:
        """Whether what is left after a loss is asked for."""
        return self.losses or self.spare is not None


def check_words(asked: Asked) -> None:
    """Everything that needs no file: choices and counts."""
    one_of("objective", asked.objective, get_args(Objective))
    one_of("engine", asked.engine, get_args(SearchEngine))
    one_of("attention", asked.attention, ("auto", "flash", "naive"))
    one_of("serving", asked.serving, ("auto", "agg", "disagg"))
    for name in SWITCHES:
        if getattr(asked, name) is not None:
            one_of(name, getattr(asked, name), ("off", "on", "auto"))
    _check_prefill(asked)
    _check_batching(asked)
    for name, most, good in (
        ("nodes", 2**17, 1),
        ("cards", 2**20, 8),
        ("trials", _MOST_TRIALS, 200),
    ):
        if getattr(asked, name) is not None:
            whole(name, getattr(asked, name), most, try_=good)
    whole("seed", asked.seed, _MOST_SEED, try_=0, least=0)
    if asked.refine_simulated is not None:
        whole("refine_simulated", asked.refine_simulated, _MOST_SIMULATED, try_=8, least=0)
    if asked.seed_trials is not None:
        whole("seed_trials", asked.seed_trials, _MOST_SEED_TRIALS, try_=8, least=0)


def seed_trials_of(asked: Asked, notes: list[str]) -> int:
    """Strategies of a coarse exact pass that a sampled search starts with."""
    if asked.engine in ("auto", "exact"):
        return 0
    count = DEFAULT_SEED_TRIALS if asked.seed_trials is None else asked.seed_trials
    count = min(count, asked.trials or DEFAULT_TRIALS)
    notes.append(
        f"the first {count} trials are the best of a coarse exact pass (seed_trials)"
        if count
        else "no trial comes from an exact pass (seed_trials=0)"
    )
    return count


def reach_of(asked: Asked, depths: tuple[int, ...]) -> Reach:
    """The dimensions beyond the plain axes, as asked."""
    word = str(asked.cp).strip().lower()
    contexts: tuple[int, ...] | None = {"off": (1,), "auto": None}.get(word, ())
    if contexts == ():
        if isinstance(asked.cp, bool) or not (word.isascii() and word.isdigit()) or not int(word):
            raise InputError(
                "`cp` is off, auto or the ranks that share a context",
                got=f"cp={shown(asked.cp)}",
                hint="try auto",
            )
        contexts = (int(word),)
    one_of("module_tp", asked.module_tp, ("off", "auto"))
    return Reach(
        depths=depths,
        contexts=contexts,
        modules=asked.module_tp == "auto",
        only=only_of(asked.only, contexts),
    )


def time_limit_of(asked: Asked) -> float | None:
    limit = asked.time_limit
    if limit is None:
        return None
    if not 0.0 <= limit <= _MOST_SECONDS:
        raise InputError(
            f"`time_limit` is from 0 to {_MOST_SECONDS:g} seconds",
            got=f"time_limit={limit:g}",
            hint="try 10",
        )
    if asked.engine not in ("auto", "exact"):
        raise InputError(
            "`time_limit` stops the exact engine; a sampling one stops after `trials`",
            got=f"engine={asked.engine}, time_limit={limit:g}",
            hint="leave one of them out",
        )
    return limit


def _check_batching(asked: Asked) -> None:
    """Sizes of graphs are positive, and given where graphs are asked for."""
    given = [name for name in ("graph_mib", "max_graphs") if getattr(asked, name) is not None]
    if given and not asked.batched:
        raise InputError(
            "limits of graphs are those of auto batching",
            got=", ".join(f"{name}={shown(getattr(asked, name))}" for name in given),
            hint="add --auto-batching, or --lengths with a workload file or trace",
        )
    if asked.graph_mib is not None:
        positive("graph_mib", asked.graph_mib, _MOST_GRAPH_MIB, try_="24")
    if asked.max_graphs is not None:
        whole("max_graphs", asked.max_graphs, _MOST_GRAPHS, try_=16)


def _check_prefill(asked: Asked) -> None:
    """Options of a prefill pool need that pool, and a cluster of its own."""
    names = ("prefill_cluster", "prefill_nodes", "prefill_cards", "prefill_device")
    given = [name for name in names if getattr(asked, name) is not None]
    if given and asked.serving == "agg":
        raise InputError(
            "a prefill pool is part of disaggregated serving",
            got=f"{', '.join(given)} with serving=agg",
            hint="add --serving disagg",
        )
    if given and asked.prefill_cluster is None:
        raise InputError(
            "sizes of a prefill pool are those of its own cluster",
            got=f"{', '.join(given)} without prefill_cluster",
            hint="name it with --prefill-cluster",
        )
    if asked.serving != "agg" and asked.engine not in ("auto", "exact"):
        raise InputError(
            "disaggregated serving is searched by the exact engine",
            got=f"engine={asked.engine}, serving={asked.serving}",
            hint="use --engine exact",
        )
