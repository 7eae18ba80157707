"""The proof on real processes (level 3): one gloo process a rank, on the CPU.

Each process makes the small model from its seed, cuts it, and runs its own module: a prefill and a
decode step against the cache that it kept. What it gives must equal its part of the unsplit
library model's. Stages hand the hidden state over by send and recv. Processes meet in a file, so
no port is taken.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardplan.models.errors import InputError, ProofError
from shardplan.models.fx.modules import (
    bind_groups,
    cut,
    group_names,
    process_groups,
    rank_module,
)
from shardplan.models.fx.prove import TOLERANCES, library_case, small_pair
from shardplan.models.fx.step import SplitStep
from shardplan.models.fx.torch_lib import torch_lib
from shardplan.models.shrink import Case
from shardplan.models.verify import Check, attempt

__all__ = ["MOST_PROCESSES", "prove_processes"]

MOST_PROCESSES = 8


def prove_processes(case: Case, *, seed: int = 0) -> list[Check]:
    """Checks of one small case on as many processes as it has ranks.

    `InputError` for more than `MOST_PROCESSES` of them, or where torch or transformers is missing.
    """
    case = library_case(case)
    ranks = case.parallel.ranks
    if ranks > MOST_PROCESSES:
        raise InputError(
            f"level 3 starts a process for each rank, at most {MOST_PROCESSES}",
            got=f"ranks of the small model={ranks}",
            hint="use --level 2, which runs them in lock step",
        )
    return [attempt(3, f"gloo, processes: {ranks}", lambda: _run(case, seed))]


def _run(case: Case, seed: int) -> str:
    spawn = importlib.import_module("torch.multiprocessing").spawn
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_process, args=(case, seed, folder), nprocs=case.parallel.ranks)
        except Exception as error:
            raise ProofError("a process failed", got=str(error).strip()[-500:]) from None
        errors = [float(path.read_text()) for path in Path(folder).glob("error*")]
    if len(errors) != case.parallel.ranks:
        raise ProofError("every process says how far off it was", got=f"{len(errors)} did")
    return f"relative error {max(errors):.2g}"


def _process(rank: int, case: Case, seed: int, folder: str) -> None:
    """One rank: init, run, compare, write the error."""
    distributed = importlib.import_module("torch.distributed")
    torch_lib().set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=case.parallel.ranks
    )
    try:
        error = _Rank(rank, case, seed).run()
    finally:
        distributed.destroy_process_group()
    (Path(folder) / f"error{rank}").write_text(repr(error))


class _Rank:
    """One process: its stage, its number there, and the groups that it is in."""

    def __init__(self, rank: int, case: Case, seed: int) -> None:
        self.pair = small_pair(case, seed, "float32")
        self.mesh = self.pair.mesh
        self.stage, self.number = divmod(rank, self.mesh.ranks)
        self.stages = case.parallel.pp
        self.groups: Mapping[str, Any] = {}
        self.worst = 0.0

    def run(self) -> float:
        """Largest relative error of a prefill and a decode step."""
        caches: list[Any] = []
        for phase in ("prefill", "decode"):
            ids = self.pair.tokens(phase)
            step, want = self.pair.both(phase, ids)
            caches = self.one(step, ids, caches, want)
            self.pair.keep(want, ids)
        return self.worst

    def one(self, step: SplitStep, ids: Any, caches: list[Any], want: list[Any]) -> list[Any]:
        """One step on this rank; returns the caches that it holds after it."""
        own = step.stages[self.stage]
        module = rank_module(own.graph, own.held, step.tensors, self.mesh, self.number)
        names = group_names(stage.graph for stage in step.stages)
        if not self.groups.keys() >= set(names):
            self.groups = process_groups(
                names, self.mesh, self.stages, lambda stage, rank: stage * self.mesh.ranks + rank
            )
        bind_groups(module, self.groups)
        wires = [self.receive() for _ in own.wires_in]
        given = {step.inputs[0]: self.part(step.program.inputs[step.inputs[0]], ids)}
        given |= zip((name for name in own.inputs if name != step.inputs[0]), caches, strict=True)
        with torch_lib().no_grad():
            out = module(*wires, *(given[name] for name in own.inputs))
        out = list(out) if isinstance(out, tuple) else [out]
        for wire in out[: len(own.wires_out)]:
            self.send(wire)
        results = dict(zip(own.outputs, out[len(own.wires_out) :], strict=True))
        for number, value in results.items():
            lies = step.program.outputs[number][1]
            self.compare(value, self.part(lies, self.pair.as_split(number, want[number])))
        return [value for number, value in results.items() if number]

    def part(self, lies: Any, value: Any) -> Any:
        return cut(value, lies, self.mesh, self.number)

    def compare(self, value: Any, wanted: Any) -> None:
        error = float((value - wanted).abs().max() / wanted.abs().max())
        self.worst = max(self.worst, error)
        if value.shape != wanted.shape or not error <= TOLERANCES["float32"]:
            raise ProofError("a rank differs from the unsplit run", got=f"relative error {error}")

    def send(self, wire: Any) -> None:
        distributed = importlib.import_module("torch.distributed")
        there = (self.stage + 1) * self.mesh.ranks + self.number
        distributed.send(torch_lib().tensor(wire.shape), there)
        distributed.send(wire.contiguous(), there)

    def receive(self) -> Any:
        """A wire: its shape first, of three dims as every hidden state has."""
        distributed = importlib.import_module("torch.distributed")
        here = (self.stage - 1) * self.mesh.ranks + self.number
        shape = torch_lib().zeros(3, dtype=torch_lib().int64)
        distributed.recv(shape, here)
        wire = torch_lib().empty(*shape.tolist())
        distributed.recv(wire, here)
        return wire
