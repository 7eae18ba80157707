"""One predicted step of each phase over time: stages of the pipeline, and the kernels of a layer.

Prefill: one prompt, piece after piece, through all stages. Decode: one step of every microbatch,
as many in flight as there are stages, in steady rotation; what a stage has begun before the
drawn step begins comes in from the left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from shardplan.costmodel.program import Kernel, Pass, Program, StageProgram
from shardplan.search.plan import Plan
from shardplan.search.predicted import Predicted
from shardplan.search.report.breakdown import kind_styles
from shardplan.search.report.lanes import Lane, Slice, lanes
from shardplan.search.report.markup import Html, table, tag
from shardplan.search.report.words import milliseconds, percent, time

__all__ = ["timeline_section"]

_HOST, _EDGE, _WAIT = "c8", "c4", "c7"
_LAYERS = ("c0", "c2", "c3", "c6")
_COLOURS = 8
_MOST_PIECES = 8
"""Pieces of a prompt that are drawn."""


def timeline_section(plan: Plan, steps: Sequence[Predicted]) -> Html:
    """Both phases; nothing where the model or the machine was not at hand."""
    if not steps:
        return Html("")
    styles = kind_styles(plan.breakdown)
    return tag(
        "section",
        tag("h2", "One step over time"),
        *[part for step in steps for part in _phase(step, styles)],
    )


def _phase(step: Predicted, styles: Mapping[str, str]) -> Iterator[Html]:
    program = step.program
    name = step.phase.capitalize()
    yield tag("h3", f"{name} step, {time(program.step_s)}")
    yield tag("p", _sentence(step))
    yield _stages(step)
    found = _busiest(program)
    if found is not None:
        one, count = found
        title = f"One {_template(one.template)} layer in {step.phase}"
        yield tag(
            "p",
            tag("b", f"{title}, {time(one.seconds)}"),
            tag("span", f"{count:,} of them take {percent(count * one.seconds / program.step_s)}"),
            class_="bar-head",
        )
        yield _layer(title, one, program.gap_s, styles)
        yield _kernel_table(title, one)


def _template(name: str) -> str:
    return name.replace("_", " ")


def _sentence(step: Predicted) -> str:
    """What is drawn."""
    program, stages = step.program, len(step.program.stages)
    if stages == 1:
        what = "One piece of a prompt" if step.phase == "prefill" else "One token of every slot"
        return f"{what}: the kernels of any rank, one after another."
    if step.phase == "prefill":
        drawn = min(step.pieces, _MOST_PIECES)
        many = "one piece" if drawn == 1 else f"{drawn} pieces, each as long as the first,"
        return (
            f"A prompt of {many} through {stages} stages; other prompts fill the gaps, at the pace"
            f" of the slowest stage ({time(program.slowest_s)})."
        )
    busy = (program.step_s - program.host_s) / (program.rotation_s - program.host_s)
    return (
        f"{step.pieces} microbatches share {stages} stages. Each gets its next token every"
        f" {time(program.rotation_s)}; stages are busy {percent(busy)} of it."
    )


def _stages(step: Predicted) -> Html:
    """A lane a stage."""
    program = step.program
    label = f"{step.phase} step over {len(program.stages)} stages: " + ", ".join(
        f"stage {one.stage} {time(one.seconds)}" for one in program.stages
    )
    if len(program.stages) == 1:
        return lanes(label, [Lane("rank", list(_alone(program)))], program.step_s)
    end_s = program.rotation_s if step.phase == "decode" else step.end_s(_MOST_PIECES)
    rows = []
    starts = step.starts_s(_MOST_PIECES) if step.phase == "prefill" else step.starts_s()
    for stage in program.stages:
        slices: list[Slice] = []
        for piece, times in enumerate(starts):
            slices += _in_window(step, stage, piece, times[stage.stage], end_s)
        if stage.stage == 0 and program.host_s:
            host = f"host: {time(program.host_s)}"
            slices.append(Slice(0.0, program.host_s, _HOST, host))
        rows.append(Lane(f"stage {stage.stage}", slices))
    return lanes(label, rows, end_s)


def _in_window(
    step: Predicted, stage: StageProgram, piece: int, begin_s: float, end_s: float
) -> Iterator[Slice]:
    """A stage's work on a piece; decoding goes round, so what leaves the step comes in again."""
    title = f"{step.what} {piece} in stage {stage.stage}: {time(stage.seconds)}, {_held(stage)}"
    style, words = f"c{piece % _COLOURS}", f"{piece}"
    round_s = end_s - step.program.host_s
    if step.phase == "decode" and begin_s >= end_s:
        begin_s -= round_s
    left_s = begin_s + stage.seconds - end_s
    if step.phase == "decode" and left_s > 1e-9 * end_s:
        yield Slice(begin_s, stage.seconds - left_s, style, title, words)
        yield Slice(step.program.host_s, left_s, style, title, words)
    else:
        yield Slice(begin_s, stage.seconds, style, title, words)


def _held(stage: StageProgram) -> str:
    """Its templates with how many of each."""
    counts: dict[str, int] = {}
    for one in stage.passes:
        counts[one.template] = counts.get(one.template, 0) + 1
    return ", ".join(f"{count} x {_template(name)}" for name, count in counts.items())


def _alone(program: Program) -> Iterator[Slice]:
    """Host, embedding, runs of like layers, head, of the one stage."""
    (stage,) = program.stages
    at_s = 0.0
    if program.host_s:
        yield Slice(0.0, program.host_s, _HOST, f"host: {time(program.host_s)}", "host")
        at_s = program.host_s
    names = list(dict.fromkeys(one.template for one in stage.passes if one.layer >= 0))
    for name, run in itertools.groupby(stage.passes, key=lambda one: one.template):
        passes = list(run)
        seconds = sum(one.seconds for one in passes)
        words = f"{len(passes)} {_template(name)} layers" if len(passes) > 1 else _template(name)
        style = _LAYERS[names.index(name) % len(_LAYERS)] if name in names else _EDGE
        yield Slice(at_s, seconds, style, f"{words}: {time(seconds)}", words)
        at_s += seconds
    if stage.launch_wait_s:
        title = f"waiting for launches by the host: {time(stage.launch_wait_s)}"
        yield Slice(at_s, stage.launch_wait_s, _WAIT, title, "launches")


def _busiest(program: Program) -> tuple[Pass, int] | None:
    """The layer that takes most of the step in all, and how many there are of it."""
    found: dict[str, list[Pass]] = {}
    for stage in program.stages:
        for one in stage.passes:
            if one.layer >= 0:
                found.setdefault(one.template, []).append(one)
    if not found:
        return None
    most = max(found.values(), key=lambda passes: len(passes) * passes[0].seconds)
    return most[0], len(most)


def _layer(title: str, one: Pass, gap_s: float, styles: Mapping[str, str]) -> Html:
    """Kernels in one lane, what crosses ranks in another."""
    own: list[Slice] = []
    crossing: list[Slice] = []
    at_s = 0.0
    for kernel in one.kernels:
        words = kernel.name if not kernel.collective else kernel.kind
        told = f"{kernel.name} ({kernel.kind}): {time(kernel.total_s)}"
        style = styles.get(kernel.kind, _HOST)
        (crossing if kernel.collective else own).append(
            Slice(at_s, kernel.total_s, style, told, words)
        )
        at_s += kernel.total_s + gap_s
    label = f"{title}: " + ", ".join(
        f"{kernel.kind} {time(kernel.total_s)}" for kernel in one.kernels
    )
    rows = [Lane("kernels", own)]
    if crossing:
        rows.append(Lane("exchange", crossing))
    return lanes(label, rows, one.seconds)


_HEADS = ("Kernel", "Kind", "Compute", "Memory", "Exchange", "Overhead", "Total", "Share")


def _kernel_table(title: str, one: Pass) -> Html:
    """The kernels in order, in ms."""
    rows = [_kernel_row(kernel, one.seconds) for kernel in one.kernels]
    return tag(
        "details",
        tag("summary", "Its kernels in order, as a table"),
        table(f"{title}: kernels in order, ms", _HEADS, rows, words=2),
    )


def _kernel_row(kernel: Kernel, whole_s: float) -> list[str]:
    parts = (kernel.compute_s, kernel.memory_s, kernel.collective_s, kernel.overhead_s)
    times = [milliseconds(value) for value in (*parts, kernel.total_s)]
    return [kernel.name, kernel.kind, *times, percent(kernel.total_s / whole_s)]
