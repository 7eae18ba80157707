"""What each feature of an LLM serving stack buys, from the plain baseline up.

    baseline        layers spread over the cards (pipeline), no KV cache, naive attention, 16-bit,
                    one request at a time
    best split      the fastest legal split of the same
    KV cache        a decode step computes one token instead of the whole sequence again
    FlashAttention  scores stay on chip
    int8 weights    weight-only (w8a16)
    int8 KV cache
    auto batching   as many requests as serve best (continuous batching, `costmodel.serving`)

Every figure is priced by the same op table and ledger as a search; nothing is put in. Each step
takes the split that is fastest with what is switched on so far. Without a cache, output token j
costs a forward pass over input + j tokens, so the mean over all j is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from shardplan.costmodel.catalog import load_cluster, resolve_cards
from shardplan.costmodel.engines import EngineProfile, load_engine
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import Load
from shardplan.costmodel.steps import step_seconds
from shardplan.models.catalog import load_model
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.models.graph import Phase
from shardplan.search.ablation_rows import Ablation, AblationRow, AttentionRow, LengthRow
from shardplan.search.evaluate import LayoutScorer, Question, context_tokens
from shardplan.search.plan import Limits, Workload
from shardplan.search.space import Choice, Space, batch_grid, build_space, chunk_grid

__all__ = ["run_ablation"]

_ATTENTION_LENGTHS = (1024, 2048, 4096, 8192)
_PROMPTS = (128, 256, 512, 1024)
_GOAL_S = 8.0
_SAMPLES = 17
_KERNELS: tuple[AttentionKernel, ...] = ("naive", "flash")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Features:
    step: str
    cache: bool
    choice: Choice
    batched: bool = False


def _features(sixteen: str) -> Iterator[_Features]:
    plain = Choice(attention="naive", weight_dtype=sixteen, kv_dtype=sixteen)
    flash = replace(plain, attention="flash")
    int8 = replace(flash, weight_dtype="w8a16")
    both = replace(int8, kv_dtype="int8")
    yield _Features(step="best split", cache=False, choice=plain)
    yield _Features(step="KV cache", cache=True, choice=plain)
    yield _Features(step="FlashAttention", cache=True, choice=flash)
    yield _Features(step="int8 weights", cache=True, choice=int8)
    yield _Features(step="int8 KV cache", cache=True, choice=both)
    yield _Features(step="auto batching", cache=True, choice=both, batched=True)


def _seconds(
    scorer: LayoutScorer, choice: Choice, phase: Phase, new: Array, prefix: Array
) -> Array:
    seconds, _ = step_seconds(
        scorer.model,
        phase,
        batch=np.ones(1),
        new=new,
        prefix=prefix,
        weight_dtype=choice.weight_dtype,
        kv_dtype=choice.kv_dtype,
        attention=choice.attention,
    )
    return seconds


def _single(
    scorer: LayoutScorer, features: _Features, input_len: int, output_len: int
) -> tuple[float, float]:
    """(TTFT, mean TPOT) of one request alone."""
    choice = features.choice
    prompt = np.array([float(input_len)])
    first = float(_seconds(scorer, choice, "prefill", prompt, np.zeros(1))[0])
    seen = input_len + np.linspace(1.0, max(output_len - 1, 1), _SAMPLES)
    if features.cache:
        each = _seconds(scorer, choice, "decode", np.ones_like(seen), seen - 1.0)
    else:
        each = _seconds(scorer, choice, "prefill", seen, np.zeros_like(seen))
    return first, float(each.mean())


def _memory(scorer: LayoutScorer, choice: Choice, batch: float, tokens: float) -> dict[str, float]:
    """Weights and cache over all cards, and the fullest card against its capacity."""
    stages = scorer.ledger.stages(
        scorer.model.machine,
        weight_dtype=choice.weight_dtype,
        kv_dtype=choice.kv_dtype,
        attention=choice.attention,
        batch=batch,
        tokens=tokens,
        context=float(context_tokens(scorer.question.workload)),
    )
    cards = scorer.parallel.tp * scorer.parallel.dp
    return {
        "weights_bytes": cards * sum(stage.weights_bytes for stage in stages),
        "kv_cache_bytes": cards * sum(float(stage.kv_cache_bytes) for stage in stages),
        "fullest_bytes": max(float(stage.total_bytes) for stage in stages),
        "capacity_bytes": scorer.ledger.capacity_bytes,
    }


def _row(scorer: LayoutScorer, features: _Features, base_s: float | None) -> AblationRow:
    work, choice = scorer.question.workload, features.choice
    first, each = _single(scorer, features, work.input_len, work.output_len)
    total_s = first + (work.output_len - 1) * each
    tokens = work.input_len + (0 if features.cache else work.output_len)
    memory = _memory(scorer, choice, 1.0 if features.cache else 0.0, float(tokens))
    return AblationRow(
        step=features.step,
        split=scorer.parallel.describe(),
        fits=memory["fullest_bytes"] <= memory["capacity_bytes"],
        batch=1,
        **memory,
        ttft_s=first,
        tpot_s=each,
        end_to_end_s=total_s,
        output_tokens_per_s=work.output_len / total_s,
        speedup=base_s / total_s if base_s else 1.0,
    )


def _batched(
    scorers: list[LayoutScorer], features: _Features, space: Space, alone: float
) -> AblationRow:
    """The best throughput over all layouts, slots and step sizes."""
    batch = np.array(space.batches, dtype=np.float64)[:, None]
    chunk = np.array(space.chunks, dtype=np.float64)[None, :]
    best: tuple[float, LayoutScorer, dict[str, float], int, int] | None = None
    for scorer in scorers:
        scores = scorer.score(features.choice, batch, chunk)
        speed = np.where(scores.feasible, scores.columns["output_tokens_per_s"], -1.0)
        at = np.unravel_index(int(np.argmax(speed)), speed.shape)
        if speed[at] > (best[0] if best else 0.0):
            columns = {name: float(values[at]) for name, values in scores.every().items()}
            slots, step = space.batches[int(at[0])], space.chunks[int(at[1])]
            best = float(speed[at]), scorer, columns, slots, step
    if best is None:
        raise InfeasibleError("no strategy of the ablation fits", hint="use more cards")
    speed_s, scorer, columns, slots, step = best
    return AblationRow(
        step=features.step,
        split=scorer.parallel.describe(),
        fits=True,
        batch=slots * scorer.parallel.dp,
        **_memory(scorer, features.choice, float(slots), float(step)),
        ttft_s=columns["ttft_s"],
        tpot_s=columns["tpot_s"],
        end_to_end_s=columns["end_to_end_s"],
        output_tokens_per_s=speed_s,
        speedup=speed_s / alone,
    )


def _attention(scorer: LayoutScorer, sixteen: str) -> Iterator[AttentionRow]:
    """Naive against flash attention of one prompt, summed over layers and the pipeline."""
    engine = scorer.question.engine
    for tokens in _ATTENTION_LENGTHS:
        own: dict[str, float] = {}
        whole: dict[str, float] = {}
        for kernel in _KERNELS:
            load = Load.of(
                "prefill",
                engine,
                batch=1.0,
                new=float(tokens),
                prefix=0.0,
                kv_dtype=sixteen,
                attention=kernel,
            )
            own[kernel] = sum(
                float(parts.total_s) for _, parts in scorer.model.by_kind("attention", load)
            )
            choice = Choice(attention=kernel, weight_dtype=sixteen, kv_dtype=sixteen)
            new = np.array([float(tokens)])
            whole[kernel] = float(_seconds(scorer, choice, "prefill", new, np.zeros(1))[0])
        yield AttentionRow(
            tokens=tokens,
            naive_s=own["naive"],
            flash_s=own["flash"],
            gain=own["naive"] / own["flash"],
            prefill_gain=whole["naive"] / whole["flash"],
        )


def _lengths(scorer: LayoutScorer, features: _Features) -> Iterator[LengthRow]:
    """Output lengths at which one request takes about eight seconds, and what it takes there."""
    longest = scorer.question.spec.max_context or 2**20

    def seconds(prompt: int, output: int) -> float:
        first, each = _single(scorer, features, prompt, output)
        return first + (output - 1) * each

    for prompt in _PROMPTS:
        outputs = np.unique(np.geomspace(2, max(longest - prompt, 2), 64).round().astype(int))
        times = [seconds(prompt, int(output)) for output in outputs]
        output_len = round(float(np.interp(_GOAL_S, times, outputs)))
        yield LengthRow(
            input_len=prompt, output_len=output_len, end_to_end_s=seconds(prompt, output_len)
        )


def run_ablation(
    model: str,
    cluster: str,
    *,
    nodes: int | None = None,
    cards: int | None = None,
    device: str | None = None,
    input_len: int = 1024,
    output_len: int = 256,
    engine_profile: str | None = None,
) -> Ablation:
    """The ablation of one model on one cluster. Raises `InputError` as a search does."""
    spec = load_model(model)
    machine = load_cluster(cluster, nodes=nodes, device=device, cards=cards)
    count = resolve_cards(machine, cards)
    engine = _engine(machine.device, engine_profile)
    sixteen = "bf16" if "bf16" in machine.device.weight_dtypes else "fp16"
    question = Question(
        spec=spec,
        cluster=machine,
        engine=engine,
        workload=Workload(input_len=input_len, output_len=output_len),
        limits=Limits(),
        objective="throughput",
        cards=count,
    )
    steps = list(_features(sixteen))
    space = build_space(
        spec,
        machine,
        engine,
        cards=count,
        choices=(steps[0].choice,),
        batches=batch_grid(512),
        chunks=chunk_grid(engine, input_len, output_len),
    )
    scorers = [LayoutScorer(question, par) for par in space.layouts]
    rows = _rows(scorers, steps, space, spec.layers)
    fastest = next(s for s in scorers if s.parallel.describe() == rows[-2].split)
    return Ablation(
        model=spec.name,
        cluster=machine.name,
        device=machine.device.name,
        cards=count,
        engine_profile=engine.name,
        input_len=input_len,
        output_len=output_len,
        rows=tuple(rows),
        attention=tuple(_attention(fastest, sixteen)),
        lengths=tuple(_lengths(fastest, steps[-2])),
        notes=(*_notes(spec.max_context, sixteen), *_floor_note(fastest, rows, sixteen)),
    )


def _engine(device: Device, asked: str | None) -> EngineProfile:
    """An engine that runs both attention kernels: the one asked for, else the device's first."""
    if asked is not None:
        engines = [load_engine(asked)]
    else:
        engines = [load_engine(name) for name in device.engine_profiles]
    able = [engine for engine in engines if set(_KERNELS) <= set(engine.attention)]
    if not able:
        raise InputError(
            "the ablation needs an engine profile that runs naive and flash attention",
            got=f"engine_profile={asked or ', '.join(device.engine_profiles)}",
            hint="try --engine-profile torch-graph",
        )
    return able[0]


def _rows(
    scorers: list[LayoutScorer], steps: list[_Features], space: Space, layers: int
) -> list[AblationRow]:
    plain = replace(steps[0], step="baseline")
    deepest = max(
        (s for s in scorers if s.parallel.tp == 1 and s.parallel.dp == 1),
        key=lambda s: s.parallel.pp,
        default=None,
    )
    if deepest is None:
        raise InfeasibleError(
            "the baseline needs a pipeline of one layer or more a card", got=f"layers={layers}"
        )
    rows = [_row(deepest, plain, None)]
    base_s = rows[0].end_to_end_s
    whole = [s for s in scorers if s.parallel.dp == 1]
    for features in steps:
        if features.batched:
            alone = rows[0].output_tokens_per_s
            rows.append(_batched(scorers, features, space, alone))
            continue
        found = [_row(s, features, base_s) for s in whole]
        fitting = [row for row in found if row.fits] or found
        rows.append(min(fitting, key=lambda row: (row.end_to_end_s, row.fullest_bytes)))
    return rows


def _floor_note(scorer: LayoutScorer, rows: list[AblationRow], sixteen: str) -> Iterator[str]:
    """Why a fused kernel may slow the decoding of one short request: its floor."""
    naive, flash = (next(r for r in rows if r.step == s) for s in ("KV cache", "FlashAttention"))
    if flash.tpot_s <= naive.tpot_s:
        return
    floors = {}
    for kernel in _KERNELS:
        load = Load.of(
            "decode",
            scorer.question.engine,
            batch=1.0,
            new=1.0,
            prefix=float(scorer.question.workload.input_len),
            kv_dtype=sixteen,
            attention=kernel,
        )
        parts = [one for _, one in scorer.model.by_kind("attention", load)]
        calls = sum(one.kernels for one in parts)
        floors[kernel] = sum(float(one.overhead_s) for one in parts) / calls * 1e6
    yield (
        "one request's decode step is bound by kernel floors: the fused kernel's is "
        f"{floors['flash']:.0f} us (measured on a 910B), that of the kernels it replaces "
        f"{floors['naive']:.0f} us together (the smallest of their kind in a profile), so "
        "FlashAttention costs a little there and pays in prefill and in batches"
    )


def _notes(longest: int, sixteen: str) -> tuple[str, ...]:
    notes = [f"16-bit numbers are {sixteen} on this device"]
    if longest and longest < max(_ATTENTION_LENGTHS):
        notes.append(
            f"the model's own context is {longest} tokens; attention at longer prompts is priced "
            "as if its positions were extended"
        )
    return tuple(notes)
