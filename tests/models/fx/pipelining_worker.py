"""Stages of a split decoder under `torch.distributed.pipelining`, two gloo processes.

Run as a script with a folder that the processes meet in.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from shardplan.models.catalog import load_model
from shardplan.models.fx.decoders import export, prepare
from shardplan.models.fx.emit import emit
from shardplan.models.fx.loops import opgraph_of
from shardplan.models.fx.modules import rank_module
from shardplan.models.fx.prove import library_case
from shardplan.models.fx.roles import decoder_program
from shardplan.models.fx.stages import cut_stages
from shardplan.models.fx.step import exported_of
from shardplan.models.fx.tiny import tiny_model
from shardplan.models.parallel import Parallelism, make_mesh
from shardplan.models.shrink import shrink

MICROBATCHES = 2


class Logits(nn.Module):
    """A prompt's logits alone: what a pipeline of one output passes on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        """ids [batch, tokens] to [batch, 1, vocab]."""
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def run(rank: int, folder: str) -> None:
    """One stage; the last compares."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    case = library_case(shrink(load_model("llama-2-13b"), Parallelism(pp=2)))
    model = tiny_model(case.spec)
    torch.manual_seed(0)  # both processes draw the same tokens
    ids = torch.randint(0, case.spec.vocab, (2 * MICROBATCHES, 4))
    exported = exported_of(export(Logits(prepare(model, 1)), [ids[:2]]))
    mesh = make_mesh(case.spec, case.parallel)
    program = decoder_program(opgraph_of(exported), mesh, case.parallel, "prefill")
    own = cut_stages(emit(exported, program), (1, 1))[rank]
    module = rank_module(own.graph, own.held, exported.tensors, mesh, 0)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, MICROBATCHES)
    with torch.no_grad():
        out = schedule.step(*([ids] if rank == 0 else []))
        if rank == 1:
            want = Logits(model)(ids)
            error = float((out - want).abs().max() / want.abs().max())
            assert error <= 1e-5, error
            print("pipelining agrees", error, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp: Any = importlib.import_module("torch.multiprocessing")
    mp.spawn(run, args=(sys.argv[1],), nprocs=2)
