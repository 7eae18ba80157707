"""From what was asked to what is searched: names resolved, defaults filled in and stated.

Every default is written down as a note. Weights and cache keep the checkpoint's own types; where
the device has no such type, the nearest of the same width is taken and said (fp8 -> w8a8 int8, bf16
-> fp16). Switches of the engine (`shardplan.costmodel.overlap`) stay as the engine has them: off,
or searched both ways where it has one on by itself. Weight types may be several each by groups of
layers; the algorithm between servers is the library's own unless asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from shardplan.costmodel.catalog import load_cluster, resolve_cards
from shardplan.costmodel.engines import EngineProfile, load_engine
from shardplan.costmodel.hardware import Cluster, Device
from shardplan.costmodel.optable import Overlap
from shardplan.costmodel.weight_types import canonical, is_mixed, with_types
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError
from shardplan.models.spec import ModelSpec
from shardplan.models.weight_groups import groups_of
from shardplan.search.algorithms import asked_algorithms
from shardplan.search.asked import (
    SWITCHES,
    Asked,
    check_words,
    reach_of,
    seed_trials_of,
    time_limit_of,
)
from shardplan.search.costs import Prices, read_prices
from shardplan.search.layouts import Reach
from shardplan.search.legality import unsupported_format, unsupported_switch
from shardplan.search.mtp import depths_and_workload
from shardplan.search.plan import Limits, Request, Workload
from shardplan.search.rulebook import rules
from shardplan.search.space import Choice
from shardplan.search.spare import Spare, read_spare
from shardplan.search.workload import DEFAULT_TPOT_S, DEFAULT_TTFT_S, read_workload, shown

__all__ = ["Asked", "Resolved", "resolve", "without_limits"]

_NATIVE = {"fp32": "bf16", "fp8": "fp8", "bf16": "bf16", "fp16": "fp16"}
_SAME_WIDTH = {"bf16": "fp16", "fp16": "bf16", "fp8": "w8a8"}


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
    switches: tuple[Choice, ...]
    """The same dtypes with switches on that are not searched, to show what those would buy."""
    notes: tuple[str, ...]
    time_limit_s: float | None
    """When the exact engine stops; None: when it is done."""
    reach: Reach
    """What is searched beyond the plain axes."""
    workload_file: str | None
    prices: Prices | None = None
    """Of an hour of a card."""
    spare: Spare | None = None
    """What may be lost while the rate is still served."""
    soft_limits: bool
    """The limits are defaults: they are dropped, and that is said, when nothing meets them."""


def _soft_limits(
    work: Workload, limits: Limits, objective: str, notes: list[str]
) -> tuple[Limits, bool]:
    """Limits for a question that sets no bound: throughput alone would let requests queue."""
    open_ended = work.concurrency is None and work.request_rate is None
    if (
        objective not in ("throughput", "cost")
        or not open_ended
        or any(limits.model_dump().values())
    ):
        return limits, False
    notes.append(
        f"no limit on TTFT or TPOT was given: {DEFAULT_TTFT_S * 1e3:.0f} ms and "
        f"{DEFAULT_TPOT_S * 1e3:.0f} ms assumed"
    )
    return Limits(ttft_s=DEFAULT_TTFT_S, tpot_s=DEFAULT_TPOT_S), True


def _refused(rule: str, known: tuple[str, ...], name: str, value: object) -> InputError:
    """A choice that the device or engine does not have, with the nearest that it has."""
    close = get_close_matches(str(value), known, n=1)
    return InputError(
        f"{rule} {', '.join(known)}",
        got=f"{name}={shown(value)}",
        hint=f"try {(close or known)[0]}",
    )


def _weight_dtypes(
    spec: ModelSpec, device: Device, asked: str, notes: list[str]
) -> tuple[str, ...]:
    """The weight types to search, `|` between them, each a type or one by groups of layers."""

    def one_of(word: str) -> str:
        return _weight_dtype(spec, device, word, notes)

    found = []
    for text in asked.split("|") if isinstance(asked, str) else (asked,):
        if not isinstance(text, str):
            found.append(one_of(text))
        elif is_mixed(text):
            found.append(canonical(with_types(text, one_of), groups_of(spec)))
        else:
            found.append(one_of(text.strip()))
    return tuple(dict.fromkeys(found))


def _weight_dtype(spec: ModelSpec, device: Device, asked: str, notes: list[str]) -> str:
    known = device.weight_dtypes
    if asked != "auto":
        if asked not in known:
            raise _refused(f"{device.name} runs weights as", known, "weight_dtype", asked)
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


def _kv_dtype(spec: ModelSpec, device: Device, asked: str, notes: list[str]) -> str:
    known = device.kv_dtypes
    if asked != "auto":
        if asked not in known:
            raise _refused(f"{device.name} caches keys and values as", known, "kv_dtype", asked)
        return asked
    native = "fp16" if spec.dtype == "fp16" else "bf16"
    found = native if native in known else _SAME_WIDTH[native]
    notes.append(f"the KV cache keeps the 16 bits of the model's activations: {found}")
    return found


def _check_formats(subject: tuple[ModelSpec, Cluster, EngineProfile], weight: str, kv: str) -> None:
    """`InputError` for types that the engine does not run on the device for this model."""
    rule = unsupported_format(*subject, weight, kv)
    if rule is None:
        return
    spec, cluster, engine = subject
    able = [
        one for one in cluster.device.weight_dtypes if not unsupported_format(*subject, one, kv)
    ]
    wider = [
        one for one in cluster.device.kv_dtypes if not unsupported_format(*subject, weight, one)
    ]
    tries = [f"--weight-dtype {one}" for one in able] or [f"--kv-dtype {one}" for one in wider]
    raise InputError(
        f"types of weights and cache that {engine.name} runs on {cluster.device.name}: "
        f"{rules()[rule].sentence}",
        got=f"rule {rule}, weight_dtype={weight}, kv_dtype={kv}, model={spec.name}",
        hint="try " + " or ".join((*tries[:4], "another --engine-profile")),
    )


def _beside(
    subject: tuple[ModelSpec, Cluster, EngineProfile],
    weight: str,
    kv: str,
    attention: tuple[str, ...],
    notes: list[str],
) -> tuple[Choice, ...]:
    """Quantized types worth showing: int8 weights either way, an int8 cache, and both."""
    device, engine = subject[1].device, subject[2]
    weights = [weight, *(d for d in ("w8a16", "w8a8") if d in device.weight_dtypes and d != weight)]
    caches = [kv, *(d for d in ("int8",) if d in device.kv_dtypes and d != kv)]
    pairs = [pair for pair in product(weights, caches) if pair != (weight, kv)]
    broken = {pair: unsupported_format(*subject, *pair) for pair in pairs}
    for rule in dict.fromkeys(rule for rule in broken.values() if rule is not None):
        left_out = ", ".join(f"{w} with {c} KV" for (w, c), one in broken.items() if one == rule)
        notes.append(f"{left_out} not shown beside, for {engine.name}: {rules()[rule].sentence}")
    return tuple(
        Choice(attention=a, weight_dtype=w, kv_dtype=c)  # type: ignore[arg-type]  # kernels
        for (w, c), rule in broken.items()
        if rule is None
        for a in attention
    )


def _switch(
    name: str,
    subject: tuple[ModelSpec, Cluster, EngineProfile],
    weights: tuple[str, ...],
    asked: str | None,
    notes: list[str],
) -> tuple[str, bool]:
    """(off, on or auto; whether it can be on at all) of one switch of the engine."""
    engine = subject[2]
    on: dict[str, Any] = {name: True}
    broken = [unsupported_switch(*subject, Overlap(**on), weight) for weight in weights]
    rule = None if None in broken else broken[0]
    if asked == "on" and rule is not None:
        raise InputError(
            f"`{name}` is not to be had here: {rules()[rule].sentence}",
            got=f"{name}=on, device={subject[1].device.name}, engine_profile={engine.name}, "
            f"weight_dtype={'|'.join(weights)}",
            hint="leave it off",
        )
    if rule is not None:
        if asked == "auto":
            notes.append(f"{name} is off: {rules()[rule].sentence}")
        return "off", False
    own = name == "fused_collectives" and engine.fused_collectives_default
    if asked is None and own:
        notes.append(f"{engine.name} has {name} on by itself: searched both ways")
    return asked or ("auto" if own else "off"), True


def _switched(
    subject: tuple[ModelSpec, Cluster, EngineProfile],
    base: tuple[Choice, ...],
    asked: Asked,
    notes: list[str],
) -> tuple[tuple[Choice, ...], tuple[Choice, ...], dict[str, str]]:
    """(choices to search, choices to show beside, what each switch is set to)."""
    settings, possible = {}, {}
    weights = tuple(dict.fromkeys(choice.weight_dtype for choice in base))
    for name in SWITCHES:
        found = _switch(name, subject, weights, getattr(asked, name), notes)
        settings[name], possible[name] = found
    values = {"off": (False,), "on": (True,), "auto": (False, True)}
    searched = list(product(*(values[settings[name]] for name in SWITCHES)))
    every = product(*((False, True) if possible[name] else (False,) for name in SWITCHES))
    others = [one for one in every if sum(one) == 1 and one not in searched]

    def spread(states: list[tuple[bool, ...]]) -> tuple[Choice, ...]:
        return tuple(
            replace(choice, weight_prefetch=prefetch, fused_collectives=fused)
            for prefetch, fused in states
            for choice in base
        )

    return spread(searched), spread(others), settings


def _engine_profile(cluster: Cluster, asked: str | None, notes: list[str]) -> EngineProfile:
    known = cluster.device.engine_profiles
    if asked is None:
        notes.append(f"engine profile {known[0]}, the first that runs on {cluster.device.name}")
        return load_engine(known[0])
    engine = load_engine(asked)
    if engine.name not in known and not Path(asked).suffix:
        raise _refused(f"{cluster.device.name} is served by", known, "engine_profile", asked)
    return engine


def without_limits(resolved: Resolved) -> Resolved:
    """The same question with its default limits dropped, and a note that says so."""
    request = resolved.request.model_copy(update={"limits": Limits()})
    note = "nothing meets the assumed limits, so they were dropped: throughput decides alone"
    return replace(resolved, request=request, soft_limits=False, notes=(*resolved.notes, note))


def _machine(asked: Asked, notes: list[str]) -> tuple[Cluster, int]:
    """(cluster, cards)."""
    cluster = (
        asked.cluster
        if isinstance(asked.cluster, Cluster)
        else load_cluster(asked.cluster, nodes=asked.nodes, device=asked.device, cards=asked.cards)
    )
    cards = resolve_cards(cluster, asked.cards)
    if asked.cards is None:
        notes.append(f"cards was not given: all {cards} of {cluster.name} may be used")
    return cluster, cards


def _attention(engine: EngineProfile, asked: str, notes: list[str]) -> tuple[str, ...]:
    if asked == "auto":
        notes.append(f"attention as {engine.name} runs it: {' or '.join(engine.attention)}")
        return engine.attention
    if asked not in engine.attention:
        raise InputError(
            f"{engine.name} runs attention as {', '.join(engine.attention)}",
            got=f"attention={asked}",
            hint="another --engine-profile, such as torch-graph, may run it",
        )
    return (asked,)


def _request(
    asked: Asked,
    engine: EngineProfile,
    cards: int,
    work: Workload,
    limits: Limits,
    settings: dict[str, str],
    seed_trials: int,
    reach: Reach,
) -> Request:
    return Request(
        objective=asked.objective,  # type: ignore[arg-type]  # checked before
        workload=work,
        limits=limits,
        cards=cards,
        weight_dtype=asked.weight_dtype,
        kv_dtype=asked.kv_dtype,
        attention=asked.attention,
        **settings,  # type: ignore[arg-type]  # names of switches
        mtp=str(asked.mtp).strip().lower(),
        cp=str(asked.cp).strip().lower(),
        module_tp=asked.module_tp,
        only=dict(reach.only),
        collectives=asked.collectives,
        engine="exact" if asked.engine == "auto" else asked.engine,  # type: ignore[arg-type]  # checked before
        engine_profile=engine.name,
        serving=asked.serving,  # type: ignore[arg-type]  # checked before
        seed=asked.seed,
        trials=asked.trials,
        robust=asked.robust,
        refine_simulated=asked.refine_simulated or 0,
        seed_trials=seed_trials,
    )


def resolve(asked: Asked) -> Resolved:
    """Everything looked up and checked. Raises `InputError` for whatever cannot be."""
    notes: list[str] = []
    check_words(asked)
    spec = load_model(asked.model) if not isinstance(asked.model, ModelSpec) else asked.model
    cluster, cards = _machine(asked, notes)
    work, limits = read_workload(asked, notes)
    limits, soft = _soft_limits(work, limits, asked.objective, notes)
    engine = _engine_profile(cluster, asked.engine_profile, notes)
    depths, work = depths_and_workload((spec, engine), asked.mtp, work, notes)
    weights = _weight_dtypes(spec, cluster.device, asked.weight_dtype, notes)
    kv = _kv_dtype(spec, cluster.device, asked.kv_dtype, notes)
    subject = (spec, cluster, engine)
    for weight in weights:
        _check_formats(subject, weight, kv)
    attention = _attention(engine, asked.attention, notes)
    if asked.serving == "agg":
        notes.append("prefill and decode share the cards (aggregated serving)")
    if asked.objective == "cards" and work.request_rate is None and limits == Limits():
        notes.append("no rate or limit was given: the fewest cards that hold the model")
    both_auto = asked.weight_dtype == asked.kv_dtype == "auto"
    base = tuple(
        Choice(attention=a, weight_dtype=weight, kv_dtype=kv)  # type: ignore[arg-type]  # checked
        for weight in weights
        for a in attention
    )
    choices, switches, settings = _switched(subject, base, asked, notes)
    choices = tuple(
        replace(one, collectives=name)
        for name in asked_algorithms(cluster, asked.collectives)
        for one in choices
    )
    beside = _beside(subject, weights[0], kv, attention, notes) if both_auto else ()
    seeds = seed_trials_of(asked, notes)
    spare = read_spare(asked, work.request_rate)
    reach = reach_of(asked, depths)
    return Resolved(
        request=_request(asked, engine, cards, work, limits, settings, seeds, reach),
        spec=spec,
        cluster=cluster,
        engine=engine,
        choices=choices,
        switches=switches,
        beside=beside,
        notes=(*notes, *spec.extra),
        time_limit_s=time_limit_of(asked),
        reach=reach,
        workload_file=asked.workload,
        prices=read_prices(asked, work.request_rate),
        spare=spare,
        soft_limits=soft,
    )
