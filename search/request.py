"""From what was asked to what is searched: names resolved, defaults filled in and stated.

Every default is written down as a note, so that an answer never hides what it assumed. Weights
and cache keep the checkpoint's own types; where the device has no such type, the nearest of the
same width is taken and said (fp8 -> w8a8 int8, bf16 -> fp16).
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from shardplan.costmodel.catalog import load_cluster, resolve_cards
from shardplan.costmodel.engines import EngineProfile, load_engine
from shardplan.costmodel.hardware import Cluster, Device
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError
from shardplan.models.spec import ModelSpec
from shardplan.search.plan import Limits, Request, Workload
from shardplan.search.space import Choice

__all__ = ["DEFAULT_TRIALS", "Asked", "Resolved", "resolve", "without_limits"]

Objective = Literal["throughput", "latency", "cards"]
SearchEngine = Literal["auto", "exact", "tpe", "nsga2", "cmaes", "random"]
DEFAULT_INPUT = 1024
DEFAULT_OUTPUT = 256
DEFAULT_TRIALS = 200
DEFAULT_TTFT_S = 2.0
DEFAULT_TPOT_S = 0.1
_MOST_TOKENS = 2**24
_MOST_REQUESTS = 2**20
_MAX_WORKLOAD_BYTES = 2**20
_NATIVE = {"fp32": "bf16", "fp8": "fp8", "bf16": "bf16", "fp16": "fp16"}
_SAME_WIDTH = {"bf16": "fp16", "fp16": "bf16", "fp8": "w8a8"}


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
    objective: str = "throughput"
    weight_dtype: str = "auto"
    kv_dtype: str = "auto"
    attention: str = "auto"
    engine: str = "auto"
    trials: int | None = None
    seed: int = 0
    engine_profile: str | None = None
    serving: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The question with everything filled in."""

    request: Request
    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    choices: tuple[Choice, ...]
    beside: tuple[Choice, ...]
    """Other dtypes, priced only to show what quantizing would buy."""
    notes: tuple[str, ...]
    soft_limits: bool
    """The limits are defaults: they are dropped, and that is said, when nothing meets them."""


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InputError(f"`{name}` is one of {', '.join(known)}", got=f"{name}={value!r}")
    return value


def _whole(name: str, value: object, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError(f"`{name}` is a whole number from 1 to {most:,}", got=f"{name}={value!r}")
    return value


def _positive(name: str, value: object) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(float(value)) or float(value) <= 0:  # type: ignore[arg-type]  # a number here
        raise InputError(f"`{name}` is a number above 0", got=f"{name}={value!r}")
    return float(value)  # type: ignore[arg-type]  # a number here


def _workload_file(path: str | None) -> dict[str, Any]:
    """Keys of a workload TOML; `InputError` for one that is not known."""
    if path is None:
        return {}
    known = ("input_len", "output_len", "concurrency", "rate", "prefix_hit", "ttft_ms", "tpot_ms")
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_WORKLOAD_BYTES:
            raise InputError("a workload file is at most 1 MiB", got=path)
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "the workload file cannot be read", got=f"{path}: {error.strerror}"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("a workload file is TOML in UTF-8", got=f"{path}: {error}") from None
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise InputError(
            "a workload file has keys " + ", ".join(known), got=f"{path}: {', '.join(unknown)}"
        )
    return table


def _workload(asked: Asked, notes: list[str]) -> tuple[Workload, Limits]:
    table = _workload_file(asked.workload)

    def said(name: str) -> Any:
        own = getattr(asked, name)
        return table.get(name) if own is None else own

    lengths = {}
    for name, default in (("input_len", DEFAULT_INPUT), ("output_len", DEFAULT_OUTPUT)):
        value = said(name)
        if value is None:
            notes.append(f"{name} was not given: {default} tokens assumed")
            value = default
        lengths[name] = _whole(name, value, _MOST_TOKENS)
    concurrency, rate, hit = said("concurrency"), said("rate"), said("prefix_hit")
    if hit is not None and not (isinstance(hit, int | float) and 0 <= hit < 1):
        raise InputError("`prefix_hit` is from 0 to below 1", got=f"prefix_hit={hit!r}")
    limits = {
        f"{name}_s": None
        if said(f"{name}_ms") is None
        else _positive(name, said(f"{name}_ms")) / 1e3
        for name in ("ttft", "tpot")
    }
    work = Workload(
        **lengths,
        concurrency=None
        if concurrency is None
        else _whole("concurrency", concurrency, _MOST_REQUESTS),
        request_rate=None if rate is None else _positive("rate", rate),
        prefix_hit=float(hit or 0.0),
    )
    if work.concurrency is None and work.request_rate is None:
        notes.append("no concurrency or rate was given: as many requests in flight as serve best")
    return work, Limits(**limits)


def _soft_limits(
    work: Workload, limits: Limits, objective: str, notes: list[str]
) -> tuple[Limits, bool]:
    """Limits for a question that sets no bound: throughput alone would let requests queue."""
    open_ended = work.concurrency is None and work.request_rate is None
    if objective != "throughput" or not open_ended or any(limits.model_dump().values()):
        return limits, False
    notes.append(
        f"no limit on TTFT or TPOT was given: {DEFAULT_TTFT_S * 1e3:.0f} ms and "
        f"{DEFAULT_TPOT_S * 1e3:.0f} ms assumed"
    )
    return Limits(ttft_s=DEFAULT_TTFT_S, tpot_s=DEFAULT_TPOT_S), True


def _weight_dtype(spec: ModelSpec, device: Device, asked: str, notes: list[str]) -> str:
    known = device.weight_dtypes
    if asked != "auto":
        if asked not in known:
            raise InputError(
                f"{device.name} runs weights as {', '.join(known)}", got=f"weight_dtype={asked}"
            )
        return asked
    native = _NATIVE.get(spec.dtype, spec.dtype)
    if native in known:
        notes.append(f"weights keep the checkpoint's type: {native}")
        return native
    other = _SAME_WIDTH.get(native, "")
    if other not in known:
        raise InputError(
            f"{device.name} runs weights as {', '.join(known)}",
            got=f"checkpoint dtype {spec.dtype}",
            hint="name one with --weight-dtype",
        )
    notes.append(f"{device.name} has no {native}: weights are {other}, which is as wide")
    return other


def _kv_dtype(device: Device, asked: str) -> str:
    if asked == "auto":
        return "bf16" if "bf16" in device.kv_dtypes else "fp16"
    if asked not in device.kv_dtypes:
        raise InputError(
            f"{device.name} caches keys and values as {', '.join(device.kv_dtypes)}",
            got=f"kv_dtype={asked}",
        )
    return asked


def _beside(device: Device, weight: str, kv: str, attention: tuple[str, ...]) -> tuple[Choice, ...]:
    """Quantized types worth showing: int8 weights either way, an int8 cache, and both."""
    weights = [weight, *(d for d in ("w8a16", "w8a8") if d in device.weight_dtypes and d != weight)]
    caches = [kv, *(d for d in ("int8",) if d in device.kv_dtypes and d != kv)]
    return tuple(
        Choice(attention=a, weight_dtype=w, kv_dtype=c)  # type: ignore[arg-type]  # kernels
        for w in weights
        for c in caches
        for a in attention
        if (w, c) != (weight, kv)
    )


def _engine_profile(cluster: Cluster, asked: str | None, notes: list[str]) -> EngineProfile:
    known = cluster.device.engine_profiles
    if asked is None:
        notes.append(f"engine profile {known[0]}, the first that runs on {cluster.device.name}")
        return load_engine(known[0])
    engine = load_engine(asked)
    if engine.name not in known and not Path(asked).suffix:
        raise InputError(
            f"{cluster.device.name} is served by {', '.join(known)}", got=f"engine_profile={asked}"
        )
    return engine


def without_limits(resolved: Resolved) -> Resolved:
    """The same question with its default limits dropped, and a note that says so."""
    request = resolved.request.model_copy(update={"limits": Limits()})
    note = "nothing meets the assumed limits, so they were dropped: throughput decides alone"
    return replace(resolved, request=request, soft_limits=False, notes=(*resolved.notes, note))


def resolve(asked: Asked) -> Resolved:
    """Everything looked up and checked. Raises `InputError` for whatever cannot be."""
    notes: list[str] = []
    objective = _one_of("objective", asked.objective, get_args(Objective))
    engine_name = _one_of("engine", asked.engine, get_args(SearchEngine))
    _one_of("serving", asked.serving, ("auto", "agg", "disagg"))
    if asked.serving == "disagg":
        raise InputError(
            "disaggregated prefill and decode is not searched by this version",
            got="serving=disagg",
            hint="use --serving agg",
        )
    _one_of("attention", asked.attention, ("auto", "flash", "naive"))
    if asked.nodes is not None:
        _whole("nodes", asked.nodes, 2**17)
    if asked.cards is not None:
        _whole("cards", asked.cards, 2**20)
    spec = load_model(asked.model) if not isinstance(asked.model, ModelSpec) else asked.model
    cluster = (
        asked.cluster
        if isinstance(asked.cluster, Cluster)
        else load_cluster(asked.cluster, nodes=asked.nodes, device=asked.device, cards=asked.cards)
    )
    cards = resolve_cards(cluster, asked.cards)
    work, limits = _workload(asked, notes)
    limits, soft = _soft_limits(work, limits, objective, notes)
    engine = _engine_profile(cluster, asked.engine_profile, notes)
    weight = _weight_dtype(spec, cluster.device, asked.weight_dtype, notes)
    kv = _kv_dtype(cluster.device, asked.kv_dtype)
    attention = engine.attention if asked.attention == "auto" else (asked.attention,)
    if not set(attention) <= set(engine.attention):
        raise InputError(
            f"{engine.name} runs attention as {', '.join(engine.attention)}",
            got=f"attention={asked.attention}",
            hint="another --engine-profile, such as torch-graph, may run it",
        )
    request = Request(
        objective=objective,  # type: ignore[arg-type]  # checked above
        workload=work,
        limits=limits,
        cards=cards,
        weight_dtype=asked.weight_dtype,
        kv_dtype=asked.kv_dtype,
        attention=asked.attention,
        engine="exact" if engine_name == "auto" else engine_name,  # type: ignore[arg-type]  # checked
        engine_profile=engine.name,
        serving="agg",
        seed=asked.seed,
        trials=asked.trials,
    )
    if objective == "cards" and work.request_rate is None and limits == Limits():
        notes.append("no rate or limit was given: the fewest cards that hold the model")
    return Resolved(
        request=request,
        spec=spec,
        cluster=cluster,
        engine=engine,
        choices=tuple(
            Choice(attention=a, weight_dtype=weight, kv_dtype=kv)  # type: ignore[arg-type]  # checked
            for a in attention
        ),
        beside=_beside(cluster.device, weight, kv, attention)
        if asked.weight_dtype == "auto" and asked.kv_dtype == "auto"
        else (),
        notes=(*notes, *spec.extra),
        soft_limits=soft,
    )
