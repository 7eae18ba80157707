"""Collectives that DTensor makes of the same decoder, on a process group of no processes.

Run as a script. The module styles are those of Megatron's split, with and without tokens over tp.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardplan.models.catalog import load_model
from shardplan.models.fx.decoders import Prefill, export, prepare
from shardplan.models.fx.loops import opgraph_of
from shardplan.models.fx.prove import library_case
from shardplan.models.fx.roles import decoder_program
from shardplan.models.fx.step import exported_of
from shardplan.models.fx.tiny import tiny_model
from shardplan.models.opshard import transfers_of
from shardplan.models.parallel import Parallelism, make_mesh
from shardplan.models.shrink import Case, shrink


def styles(sp: bool, layers: int) -> dict[str, Any]:
    """Parallel styles by module of a Llama."""
    rows = Shard(1) if sp else Replicate()
    found: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=rows),
        "lm_head": ColwiseParallel(
            input_layouts=Replicate(), output_layouts=Replicate(), use_local_output=True
        ),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj"):
            found[f"{at}.self_attn.{name}"] = ColwiseParallel()
        for name in ("gate_proj", "up_proj"):
            found[f"{at}.mlp.{name}"] = ColwiseParallel()
        found[f"{at}.self_attn.o_proj"] = RowwiseParallel(output_layouts=rows)
        found[f"{at}.mlp.down_proj"] = RowwiseParallel(output_layouts=rows)
        if sp:
            found[f"{at}.input_layernorm"] = SequenceParallel(use_local_output=True)
            found[f"{at}.post_attention_layernorm"] = SequenceParallel(use_local_output=True)
            found[f"{at}.self_attn"] = PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            )
            found[f"{at}.mlp"] = PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            )
    if sp:
        found["model.norm"] = SequenceParallel(use_local_output=True)
    return found


def by_dtensor(case: Case) -> Counter[str]:
    """Collectives by kind."""
    mesh = init_device_mesh("cpu", (case.parallel.tp,))
    model = tiny_model(case.spec)
    for name, style in styles(case.parallel.sp, case.spec.layers).items():
        parallelize_module(model.get_submodule(name), mesh, style)
    mode: Any = CommDebugMode
    counted = mode()
    ids = torch.zeros(case.batch, case.tokens, dtype=torch.int64)
    with torch.no_grad(), counted:
        model.model(input_ids=ids, use_cache=False)
    names = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
    found: Counter[str] = Counter()
    for kind, count in counted.get_comm_counts().items():
        name = str(kind).rsplit(".", 1)[-1]
        found[names.get(name, name)] += count
    return found


def by_us(case: Case) -> Counter[str]:
    """The same, up to the final norm."""
    ids = torch.zeros(case.batch, case.tokens, dtype=torch.int64)
    exported = exported_of(export(Prefill(prepare(tiny_model(case.spec), case.parallel.tp)), [ids]))
    mesh = make_mesh(case.spec, case.parallel)
    program = decoder_program(opgraph_of(exported), mesh, case.parallel, "prefill")
    kinds = [kind for kind, _, _ in transfers_of(program)]
    # behind the final norm: its output is gathered where tokens are split, then the logits
    return Counter(kinds[: len(kinds) - (2 if case.parallel.sp else 1)])


def main() -> None:
    """Compare both, for tp alone and with sp."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    for sp in (False, True):
        case = library_case(shrink(load_model("llama-2-13b"), Parallelism(tp=4, sp=sp)))
        theirs, ours = by_dtensor(case), by_us(case)
        assert theirs == ours, (sp, theirs, ours)
        print("DTensor agrees", dict(ours))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
