"""Runs an emitted DTensor plan on a small Llama in a fake process group; prints what it counted.

    python torch_run.py FOLDER RANKS [tied]   ->   `all_reduce 9` ..., `parameters N`, `error X`

The numbers come from a second run, of all ranks in one process (torch's LocalTensorMode, which is
private: skipped where a torch has none). The model has the module names and the calling conventions
of LlamaForCausalLM in transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, TOKENS = 64, 96, 4, 8, 4, 128, 16
HEAD_DIM = HIDDEN // HEADS


class Attention(nn.Module):
    """Grouped-query attention on however many heads this rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> Any:
        batch, tokens, _ = hidden_states.shape
        q, k, v = (
            part(hidden_states).view(batch, tokens, -1, HEAD_DIM).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (one.repeat_interleave(HEADS // KV_HEADS, dim=1) for one in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.up_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()
        self.input_layernorm = nn.RMSNorm(HIDDEN)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.self_attn(hidden_states=self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Inner(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Model(nn.Module):
    """The causal language model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Inner()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.lm_head(self.model(ids))


def _model() -> Model:
    """The same numbers each time; the head on the embedding's table where asked."""
    torch.manual_seed(0)
    model = Model()
    if "tied" in sys.argv:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _error(parallel_plan: Any, ranks: int) -> float:
    """Largest difference of the logits of all ranks, run in one process, from the whole model's."""
    local = importlib.import_module("torch.distributed._local_tensor")
    model, ids = _model(), torch.randint(0, VOCAB, (1, TOKENS))
    with torch.no_grad():
        expected = model(ids)
        with local.LocalTensorMode(ranks):
            found = parallel_plan.parallelize(model, parallel_plan.device_mesh("cpu"))(ids)
            whole = found.reconcile() if hasattr(found, "reconcile") else found
    return float((whole - expected).abs().max())


def main() -> None:
    """Count the collectives of one prompt and the parameters that rank 0 holds."""
    folder, ranks = sys.argv[1], int(sys.argv[2])
    sys.path.insert(0, folder)
    parallel_plan = importlib.import_module("parallel_plan")

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    model = parallel_plan.parallelize(_model(), parallel_plan.device_mesh("cpu"))
    counter = cast(Any, CommDebugMode)()
    with torch.no_grad(), counter:
        model(torch.zeros(1, TOKENS, dtype=torch.long))
    kinds = ("all_reduce", "all_gather", "reduce_scatter")
    for op, count in counter.get_comm_counts().items():
        kind = next(one for one in kinds if one in str(op))
        print(kind, count)
    held = sum(
        (one.to_local() if hasattr(one, "to_local") else one).numel() for one in model.parameters()
    )
    print("parameters", held)
    if importlib.util.find_spec("torch.distributed._local_tensor"):
        print("error", _error(parallel_plan, ranks))


if __name__ == "__main__":
    main()
