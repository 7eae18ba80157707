"""What a human's own configuration is worth: legal, fitting, how fast, how far from the best.

configuration -> model, cluster, layout -> rules -> memory -> price -> the best plan beside it

An *error* says that the engine or the machine cannot run it as it stands, a *warning* that it runs
otherwise than written or breaks a limit that was asked for. A configuration with errors is still
priced where it can be. The engine admits requests while their cache fits, so the slots priced are
those that fit, at most the configured ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shardplan.costmodel.optable import Overlap
from shardplan.models.errors import InfeasibleError, InputError, LayoutError
from shardplan.models.parallel import Parallelism, balanced_stages
from shardplan.models.spec import ModelSpec
from shardplan.search.api import search
from shardplan.search.build_plan import lever, memory_rows, performance
from shardplan.search.configuration import Configuration
from shardplan.search.evaluate import LayoutScorer, context_tokens
from shardplan.search.kept import Kept, kept_at
from shardplan.search.legality import broken_rules, broken_switch_rules
from shardplan.search.lint_case import Case, case_of, parallel_of, spec_of
from shardplan.search.lint_pool import instance_finding
from shardplan.search.lint_report import Best, Finding, LintReport
from shardplan.search.plan import StrategyInfo
from shardplan.search.request import Asked
from shardplan.search.rulebook import Role, Subject, rules
from shardplan.search.seen import AT_RATE

__all__ = ["lint"]


def lint(config: Configuration, asked: Asked, *, best: bool = True) -> LintReport:
    """Judge a configuration against the machine and workload of `asked`.

    `asked.model`: of which model it is, "" where its name says so. `best`: search the best plan of
    the same model, machine, types and workload, too. Raises `InputError` where the model or the
    machine is not known.
    """
    spec = spec_of(config, asked)
    par = parallel_of(config, spec)
    found = [
        Finding(level="error", rule="mindie-config", sentence=rule, source=_MINDIE, got=g, hint=h)
        for rule, g, h in config.broken
    ]
    notes = tuple(_notes(config, spec))
    try:
        case = case_of(config, spec, par, asked)
    except InputError as error:
        refused = _refusal(error)
        return _report(config, spec, par, (*found, refused, *notes))
    found += _rules(case)
    try:
        scorer = LayoutScorer(case.question, case.parallel)
    except LayoutError as error:
        found.append(_refusal(error))
        return _report(config, spec, par, (*found, *notes), case=case)
    priced = _price(case, scorer, found)
    report = _report(config, spec, par, (*found, *notes), case=case)
    if priced is None:
        return report
    rows = memory_rows(scorer, priced)
    told = report.model_copy(
        update={
            "strategy": _strategy(case, priced),
            "slots": priced.batch,
            "memory": rows,
            "lever": lever(rows, priced, case.question.cluster.device),
        }
    )
    if config.role != "mixed":
        one = instance_finding(case, priced.batch, priced.chunk)
        return told.model_copy(update={"findings": (*told.findings, one)})
    told = told.model_copy(update={"performance": performance(priced.columns)})
    return _beside_best(told, case, asked) if best else told


_MOST_SLOTS = 2**20
_MINDIE = (
    "MindIE-LLM docs/zh/user_guide/user_manual/service_parameter_configuration.md and "
    "docs/zh/user_guide/optimization_and_tuning.md"
)


def _notes(config: Configuration, spec: ModelSpec) -> Iterator[Finding]:
    if config.experts_parallel and spec.moe is None:
        yield _note("expert parallelism does nothing for a model without experts", spec.name)
    if config.role != "mixed":
        yield _note(
            "one pool of a disaggregated deployment is judged by itself",
            f"role={config.role}",
        )
    for option in config.unread:
        yield _note("an option that is not read here", option)


def _note(sentence: str, got: str) -> Finding:
    return Finding(level="note", rule="", sentence=sentence, source="", got=got, hint="")


def _refusal(error: InputError) -> Finding:
    return Finding(
        level="error",
        rule=error.code,
        sentence=error.rule,
        source="",
        got=error.got,
        hint=error.hint,
    )


def _rules(case: Case) -> list[Finding]:
    """Every rule that binds the engine and the device and does not hold."""
    choice, question = case.choice, case.question
    role: Role = case.config.role if case.config.role in ("prefill", "decode") else "mixed"  # type: ignore[assignment]  # one of the three
    subject = Subject(
        spec=question.spec,
        cluster=question.cluster,
        engine=question.engine,
        parallel=case.parallel,
        overlap=Overlap(
            weight_prefetch=choice.weight_prefetch, fused_collectives=choice.fused_collectives
        ),
        weight_dtype=choice.weight_dtype,
        kv_dtype=choice.kv_dtype,
        role=role,
    )
    known = rules()
    return [
        Finding(
            level="error",
            rule=name,
            sentence=known[name].sentence,
            source=known[name].source,
            got=case.parallel.describe(),
            hint="",
        )
        for name in (*broken_rules(subject), *broken_switch_rules(subject))
    ]


def _price(case: Case, scorer: LayoutScorer, found: list[Finding]) -> Kept | None:
    """The configuration priced at the slots that fit; what speaks against it goes to `found`."""
    config, engine = case.config, case.question.engine
    seqs = config.max_num_seqs or engine.max_num_seqs
    chunk = config.max_num_batched_tokens or engine.max_num_batched_tokens
    if seqs > _MOST_SLOTS:
        raise InputError(f"a group holds at most {_MOST_SLOTS:,} sequences", got=f"{seqs:,}")
    found += _lengths(case, seqs, chunk)
    slots = np.arange(1.0, seqs + 1.0)
    held = scorer.memory(case.choice, slots, np.full(seqs, float(chunk)))
    room = scorer.ledger.capacity_bytes
    fitting = int(np.count_nonzero(held <= room))
    if not fitting:
        found.append(_too_big(case, scorer, float(held[0]), chunk))
        return None
    if fitting < seqs:
        tokens = context_tokens(case.question.workload)
        found.append(
            Finding(
                level="warning",
                rule="cache",
                sentence="the cache holds fewer sequences than the engine may schedule",
                source="memory ledger",
                got=f"{fitting} of {tokens} tokens fit a group, max_num_seqs={seqs}",
                hint=f"try max_num_seqs={fitting}, so that none is preempted",
            )
        )
    batch, step = np.array([float(fitting)]), np.array([float(max(chunk, fitting))])
    scores = scorer.score(case.choice, batch, step)
    one = kept_at(scores, case.parallel, case.choice, batch, step, np.zeros(1, dtype=np.int64))
    kept = one.one(0)
    if config.role == "mixed":
        found += _limits(case, kept)
    return kept


def _lengths(case: Case, seqs: int, chunk: int) -> Iterator[Finding]:
    """What the engine's own sizes do not allow."""
    config, tokens = case.config, context_tokens(case.question.workload)
    least = seqs * (1 + case.parallel.mtp)
    longest = config.max_model_len or case.question.spec.max_context or tokens
    if chunk < least:
        yield Finding(
            level="error",
            rule="step",
            sentence="a step holds the tokens that every sequence decodes",
            source="vllm 0.23.0 vllm/config/scheduler.py: max_num_batched_tokens >= max_num_seqs",
            got=f"max_num_batched_tokens={chunk}, max_num_seqs={seqs}, mtp={case.parallel.mtp}",
            hint=f"try max_num_batched_tokens={least}",
        )
    if longest < tokens:
        yield Finding(
            level="error",
            rule="context",
            sentence="a request's prompt and answer fit the longest sequence",
            source="the configuration's max_model_len, or the model's own",
            got=f"{longest} allowed, {tokens} asked for",
            hint=f"try max_model_len={tokens}",
        )


def _limits(case: Case, kept: Kept) -> Iterator[Finding]:
    """Limits on time that were asked for and are missed."""
    limits = case.question.limits
    if case.resolved.soft_limits:  # defaults of a search, which nobody asked for here
        return
    rate = case.question.workload.request_rate
    for name, column, most, where in (
        ("ttft", "ttft_s", limits.ttft_s, ""),
        ("tpot", "tpot_s", limits.tpot_s, ""),
        ("ttft", AT_RATE, limits.ttft_s, f" with the queue of {rate or 0.0:g} requests/s"),
    ):
        value = kept.columns.get(column, 0.0)
        if most is not None and value > most:
            yield Finding(
                level="warning",
                rule=name,
                sentence=f"the mean {name.upper()}{where} is above its limit",
                source="the question",
                got=f"{value * 1e3:.1f} ms, {most * 1e3:g} ms allowed",
                hint="fewer sequences, or the plan below",
            )


def _too_big(case: Case, scorer: LayoutScorer, held_bytes: float, chunk: int) -> Finding:
    """One sequence does not fit: how much is missing, and the largest lever."""
    one = np.ones(1)
    scores = scorer.score(case.choice, one, np.full(1, float(chunk)))
    at = np.zeros(1, dtype=np.int64)
    kept = kept_at(scores, case.parallel, case.choice, one, np.full(1, float(chunk)), at).one(0)
    rows = memory_rows(scorer, kept)
    return Finding(
        level="error",
        rule="memory",
        sentence="weights, activations and one sequence fit a card",
        source="memory ledger",
        got=f"{held_bytes / 2**30:.1f} GiB needed, "
        f"{scorer.ledger.capacity_bytes / 2**30:.1f} GiB may be used",
        hint=lever(rows, kept, case.question.cluster.device),
    )


def _strategy(case: Case, kept: Kept) -> StrategyInfo:
    par, choice = case.parallel, case.choice
    layers = balanced_stages(case.question.spec, par)
    return StrategyInfo(
        tp=par.tp,
        pp=par.pp,
        dp=par.dp,
        ep=par.ep,
        cp=par.cp,
        sp=par.sp,
        exchange=par.exchange,
        stage_layers=layers,
        attention=choice.attention,
        weight_dtype=choice.weight_dtype,
        kv_dtype=choice.kv_dtype,
        weight_prefetch=choice.weight_prefetch,
        fused_collectives=choice.fused_collectives,
        mtp=par.mtp,
        batch=kept.batch,
        chunk=kept.chunk,
    )


def _report(
    config: Configuration,
    spec: ModelSpec,
    par: Parallelism,
    findings: tuple[Finding, ...],
    case: Case | None = None,
) -> LintReport:
    machine = case.question.cluster if case is not None else None
    return LintReport(
        source=config.source,
        model=spec.name,
        layout=par.describe(),
        cluster=machine.name if machine else "",
        device=machine.device.name if machine else "",
        engine_profile=case.question.engine.name if case else config.engine_profile,
        workload=case.question.workload if case else None,
        findings=findings,
    )


def _beside_best(report: LintReport, case: Case, asked: Asked) -> LintReport:
    """The report with the best plan of the same question; none where nothing is feasible."""
    choice, request = case.choice, case.resolved.request
    ours = report.performance
    try:
        plan = search(
            case.question.spec,
            case.resolved.cluster,
            cards=case.parallel.ranks,
            input_len=request.workload.input_len,
            output_len=request.workload.output_len,
            concurrency=request.workload.concurrency,
            rate=request.workload.request_rate,
            ttft_ms=asked.ttft_ms,
            tpot_ms=asked.tpot_ms,
            weight_dtype=choice.weight_dtype,
            kv_dtype=choice.kv_dtype,
            engine_profile=case.question.engine.name,
            mtp="auto" if case.parallel.mtp else "off",
        ).plan
    except InfeasibleError as error:
        none = Finding(
            level="note",
            rule="",
            sentence="no plan keeps the limits",
            source="",
            got=error.rule,
            hint=error.hint,
        )
        return report.model_copy(update={"findings": (*report.findings, none)})
    theirs = plan.performance
    best = Best(
        strategy=plan.strategy,
        performance=theirs,
        gain=theirs.output_tokens_per_s / ours.output_tokens_per_s if ours else None,
        gap=plan.certificate.gap,
    )
    return report.model_copy(update={"best": best})
