"""The proof on PyTorch graphs (level 2): real Hugging Face classes, all ranks in lock step.

A small model of the plan's architecture and ratios, with random weights, is exported and its
graph split as the plan says. A prefill and decode steps against the sharded caches must give

    the logits and caches of the unsplit library model      float32, 1e-5 relative
    those of the unsplit export with all floats widened     float64, 1e-10 relative
    exactly the collectives, with the elements, that `predict_communication` says, and of those
    exactly the ones that stand in the program that was laid on the graph

The library's classes compute norms and rotary tables in float32 whatever the model's dtype, so the
float64 pass is on graphs in which every float32 is made a float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from shardplan.models.accounting import predict_communication
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.errors import ProofError
from shardplan.models.fx.loops import opgraph_of
from shardplan.models.fx.roles import check_split, decoder_program
from shardplan.models.fx.step import (
    Exported,
    SplitStep,
    exported_of,
    split_step,
    unsplit,
    whole_value,
    widened,
)
from shardplan.models.fx.tiny import model_type, tiny_model
from shardplan.models.fx.torch_lib import torch_lib, transformers_lib
from shardplan.models.graph import Phase
from shardplan.models.lockstep import Communication
from shardplan.models.opgraph import OpGraph
from shardplan.models.opshard import transfers_of
from shardplan.models.parallel import balanced_stages, make_mesh
from shardplan.models.shrink import Case
from shardplan.models.verify import Check, attempt

__all__ = [
    "DECODE_STEPS",
    "TOLERANCES",
    "Mutate",
    "Pair",
    "library_case",
    "prove_graphs",
    "small_pair",
]

TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
DECODE_STEPS = 2
Mutate = Callable[[SplitStep], SplitStep]


def library_case(case: Case) -> Case:
    """A case as the library takes it: a hidden size that is a multiple of the heads.

    `InputError` for what is not proven on PyTorch graphs, or where a package is missing.
    """
    torch_lib()
    transformers_lib()
    model_type(case.spec)
    check_split(case.parallel)
    width = math.lcm(case.spec.hidden, case.spec.heads)
    return replace(case, spec=replace(case.spec, hidden=width))


def prove_graphs(
    case: Case, *, seed: int = 0, quantized: bool = False, mutate: Mutate | None = None
) -> list[Check]:
    """Checks of one small case. `mutate` exists so that faults can be planted.

    `InputError` where torch or transformers is missing or the architecture is not known.
    """
    case = library_case(case)

    def run(dtype: str) -> str:
        pair = small_pair(case, seed, dtype, quantized=quantized, mutate=mutate)
        for turn in range(1 + DECODE_STEPS):
            pair.step("decode" if turn else "prefill")
        return f"relative error {pair.worst:.2g}; {pair.moved} transfers, as predicted"

    return [attempt(2, f"{dtype}: prefill, decode", partial(run, dtype)) for dtype in TOLERANCES]


def small_pair(
    case: Case, seed: int, dtype: str, *, quantized: bool = False, mutate: Mutate | None = None
) -> Pair:
    """The two runs of a small model with weights and tokens of a seed."""
    from shardplan.models.fx.decoders import prepare, quantize

    model = tiny_model(case.spec, seed=seed)
    ready = prepare(model, case.parallel.tp)
    if quantized:
        model = ready = quantize(ready)
    return Pair(case, model, ready, dtype, seed, mutate)


class Pair:
    """The unsplit and the split run of one model, fed the same tokens."""

    def __init__(
        self, case: Case, model: Any, ready: Any, dtype: str, seed: int, mutate: Mutate | None
    ) -> None:
        self.case, self.model, self.ready = case, model, ready
        self.dtype, self.mutate = dtype, mutate
        self.mesh = make_mesh(case.spec, case.parallel)
        self.times = _kv_heads(ready) // _kv_heads(model)
        self.draw = torch_lib().Generator().manual_seed(seed + 1)
        self.caches: list[Any] = []
        self.held: list[list[Any]] = []
        self.context = 0
        self.worst = 0.0
        self.moved = 0

    def tokens(self, phase: Phase) -> Any:
        """Random tokens of a step, [batch, tokens]."""
        shape = (self.case.batch, 1 if phase == "decode" else self.case.tokens)
        return torch_lib().randint(0, self.case.spec.vocab, shape, generator=self.draw)

    def step(self, phase: Phase) -> None:
        """One step of both, compared; the caches are kept."""
        ids = self.tokens(phase)
        step, want = self.both(phase, ids)
        log: list[Communication] = []
        got = step.run([step.parts(0, ids), *self.held], log)
        self.keep(want, ids)
        self.compare(step, phase, want, got)
        self.check_moves(step, phase, ids.shape[1], log)
        self.held, self.moved = got[1:], self.moved + len(log)

    def both(self, phase: Phase, ids: Any) -> tuple[SplitStep, list[Any]]:
        """(the split step, outputs of the unsplit one)."""
        from shardplan.models.fx.decoders import Decode, Prefill, export

        wrapper = Prefill if phase == "prefill" else Decode
        example = [self.as_split(1, one).float() for one in self.caches]
        exported = exported_of(export(wrapper(self.ready), [ids, *example]))
        graph = opgraph_of(exported)
        if self.dtype == "float64":
            exported = widened(exported)
            want = unsplit(exported, graph, [ids, *self.caches])
        else:
            with torch_lib().no_grad():
                want = list(wrapper(self.model)(ids, *self.caches))
        return self.split(exported, graph, phase), want

    def keep(self, want: list[Any], ids: Any) -> None:
        """Note the caches of the unsplit run."""
        self.caches, self.context = want[1:], self.context + ids.shape[1]

    def as_split(self, number: int, value: Any) -> Any:
        """An output of the unsplit run as the split one has it: kv heads may be repeated."""
        times = 1 if self.dtype == "float64" or number == 0 else self.times
        return value.repeat_interleave(times, 1)

    def split(self, exported: Exported, graph: OpGraph, phase: Phase) -> SplitStep:
        """The step as the plan splits it, with the fault to plant if any."""
        par = self.case.parallel
        program = decoder_program(graph, self.mesh, par, phase)
        step = split_step(exported, program, balanced_stages(self.case.spec, par))
        return self.mutate(step) if self.mutate is not None else step

    def compare(
        self, step: SplitStep, phase: Phase, want: Sequence[Any], got: Sequence[list[Any]]
    ) -> None:
        """Logits and caches of both runs; `ProofError` where they differ."""
        for i, (whole, parts) in enumerate(zip(want, got, strict=True)):
            name, lies = step.program.outputs[i]
            value = whole_value(parts, lies, self.mesh)
            wanted = self.as_split(i, whole)
            if value.shape != wanted.shape:
                raise ProofError(
                    "an output has the shape of the unsplit run",
                    got=f"{name}: {list(value.shape)} for {list(wanted.shape)}",
                )
            error = float((value - wanted).abs().max() / wanted.abs().max())
            self.worst = max(self.worst, error)
            if not error <= TOLERANCES[self.dtype]:
                raise ProofError(
                    f"{phase} differs from the unsplit run",
                    got=f"{name}: relative error {error:.3g}, allowed {TOLERANCES[self.dtype]:g}",
                )

    def check_moves(
        self, step: SplitStep, phase: Phase, tokens: int, log: list[Communication]
    ) -> None:
        """What crossed ranks, against the price's graph and against the program."""
        graph = apply(build_graph(self.case.spec, phase), self.case.parallel)
        expected = predict_communication(graph, self.case.batch, tokens, self.context)
        made = Counter((one.stage, one.kind, one.ranks, one.elements) for one in log)
        wanted = Counter((one.stage, one.kind, one.ranks, one.elements) for one in expected)
        if made != wanted:
            raise ProofError(
                "collectives differ from the prediction",
                got=f"{phase}: made only {dict(made - wanted)}, predicted only "
                f"{dict(wanted - made)}",
            )
        placed = Counter(transfers_of(step.program))
        ran = Counter((one.kind, one.axes, one.elements) for one in log if one.kind != "send")
        if placed - ran or (ran - placed and not _dispatches(step)):
            raise ProofError(
                "the collectives that ran are those of the program",
                got=f"{phase}: placed only {dict(placed - ran)}, ran only {dict(ran - placed)}",
            )


def _dispatches(step: SplitStep) -> bool:
    """Whether rows are sent to experts, how many is known when the step runs."""
    return any(getattr(one, "sent", None) for one in step.program.steps)


def _kv_heads(model: Any) -> int:
    found: int = model.config.num_key_value_heads
    return found
