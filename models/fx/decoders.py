"""Hugging Face decoders made ready to be split, and their two steps as modules to export.

    prepare     experts in the form of `shardplan.models.fx.experts`; kv heads repeated so that
                each rank of a wider tp has one of its own (the same function, exactly)
    Prefill     ids [batch, tokens] -> (logits of the last token [batch, 1, vocab], caches)
    Decode      ids [batch, 1], caches -> (logits [batch, 1, vocab], caches grown by one token)
    Quantized   a linear product on int8 weights with one scale an output channel

Caches are key and value of each layer, [batch, kv heads, context, head size].
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from shardplan.models.errors import InputError
from shardplan.models.fx.experts import experts, gates
from shardplan.models.fx.loops import opgraph_of
from shardplan.models.fx.step import Exported, exported_of
from shardplan.models.fx.torch_lib import transformers_lib
from shardplan.models.graph import Phase
from shardplan.models.opgraph import OpGraph

__all__ = [
    "Decode",
    "Prefill",
    "Quantized",
    "RoutedExperts",
    "export",
    "export_step",
    "prepare",
    "quantize",
]

_BLOCKS = (
    "DeepseekV2Moe",
    "MixtralSparseMoeBlock",
    "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeSparseMoeBlock",
)
_ALWAYS_NORMALISED = ("MixtralSparseMoeBlock",)


@dataclass(frozen=True, slots=True)
class _Held:
    """A cache, as the keyword argument that a model takes it by."""

    layers: list[Any]
    named: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """Key and value of each layer in turn."""
        return [one for layer in self.layers for one in (layer.keys, layer.values)]


def _cache(model: Any, held: Sequence[Tensor]) -> _Held:
    """A cache with key and value of each layer in turn, or an empty one.

    Its layers start with what they are given, where the library's join it to an empty tensor.
    """
    library = transformers_lib()
    plain = library.DynamicCache().layer_class_to_replicate

    def update(layer: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if layer.is_initialized:
            return plain.update(layer, key, value)
        layer.keys, layer.values, layer.is_initialized = key, value, True
        return key, value

    kind = type("Layer", (plain,), {"update": update})
    layers = [kind() for _ in range(model.config.num_hidden_layers)]
    for layer, key, value in zip(layers, held[::2], held[1::2], strict=False):
        layer.update(key, value)
    takes = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
    return _Held(layers, {name: library.Cache(layers=layers)})


class Prefill(nn.Module):
    """A prompt: logits of its last token, and the caches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids [batch, tokens]."""
        cache = _cache(self.model, ())
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache.named)
        return (out.logits, *cache.tensors())


class Decode(nn.Module):
    """One token of each sequence against its caches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """ids [batch, 1]; caches are key and value of each layer in turn."""
        cache = _cache(self.model, caches)
        out = self.model(input_ids=ids, use_cache=True, **cache.named)
        return (out.logits, *cache.tensors())


class RoutedExperts(nn.Module):
    """A mixture of experts with its parameters apart: router, gate, up and down projections."""

    def __init__(self, block: nn.Module, config: Any) -> None:
        super().__init__()
        router, held = _part(block, "gate"), _part(block, "experts")
        if getattr(config, "hidden_act", "silu") != "silu":
            raise InputError("experts are gated by silu", got=f"hidden_act={config.hidden_act}")
        if getattr(router, "topk_method", "greedy") != "greedy":
            raise InputError(
                "experts are chosen among all of them",
                got=f"topk_method={router.topk_method}",
                hint="groups of experts are not applied to PyTorch graphs",
            )
        kind = type(block).__name__
        self.topk = int(router.top_k)
        always = kind in _ALWAYS_NORMALISED
        self.normalise = always or bool(getattr(router, "norm_topk_prob", False))
        self.scale = float(getattr(router, "routed_scaling_factor", 1.0))
        gate, up = held.gate_up_proj.detach().chunk(2, 1)
        self.router = nn.Linear(router.weight.shape[1], router.weight.shape[0], bias=False)
        self.router.weight = nn.Parameter(router.weight.detach().to(gate.dtype))
        self.gate = nn.Parameter(gate.contiguous())
        self.up = nn.Parameter(up.contiguous())
        self.down = nn.Parameter(held.down_proj.detach())
        self.shared = _shared(block)
        self.shared_gate = getattr(block, "shared_expert_gate", None)

    def forward(self, x: Tensor) -> Any:
        """x [batch, tokens, hidden], and the same out."""
        weights = gates(self.router(x), self.topk, self.normalise, self.scale, False)
        out = experts(x, weights, self.gate, self.up, self.down)
        if self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(x)) * shared
        return out + shared


def _part(block: nn.Module, name: str) -> Any:
    return getattr(block, name)


def _shared(block: nn.Module) -> Any:
    return getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)


def prepare(model: Any, tp: int) -> Any:
    """A copy of a Hugging Face causal decoder that computes the same and can be split tp ways.

    `InputError` for experts of a class that is not known, or heads that tp does not divide.
    """
    config = model.config
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", heads)
    made = _repeated(model, tp // kv) if _repeats(model, kv, tp) else copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if hasattr(module, "expand_kv"):
            module.expand_kv = functools.partial(_expanded, module)
        if not (hasattr(module, "experts") and hasattr(module, "gate")):
            continue
        if type(module).__name__ not in _BLOCKS:
            raise InputError(
                "experts are of a class whose routing is known",
                got=type(module).__name__,
                hint="known: " + ", ".join(_BLOCKS),
            )
        made.set_submodule(name, RoutedExperts(module, config))
    return made.eval()


def _expanded(attention: Any, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads from the latent, written nowhere in place.

    latent [batch, 1, context, rank], rotary [batch, 1, context, part]; both results
    [batch, heads, context, size].
    """
    nope, value = attention.qk_nope_head_dim, attention.v_head_dim
    both = attention.kv_b_proj(latent.squeeze(1)).unflatten(-1, (-1, nope + value)).transpose(1, 2)
    key, values = both.split([nope, value], -1)
    shared = rotary.expand(-1, key.shape[1], -1, -1)
    return torch.cat([key, shared], -1), values


def _repeats(model: Any, kv: int, tp: int) -> bool:
    """Whether kv heads are repeated; latent attention has one for each head already."""
    if tp <= kv or getattr(model.config, "kv_lora_rank", None):
        return False
    if tp % kv or model.config.num_attention_heads % tp:
        raise InputError(
            "tp beyond the kv heads is a multiple of them and divides the heads",
            got=f"tp={tp}, kv heads={kv}, heads={model.config.num_attention_heads}",
        )
    return True


def _repeated(model: Any, times: int) -> Any:
    """The same model with each kv head `times` times."""
    config = copy.deepcopy(model.config)
    kv = config.num_key_value_heads
    config.num_key_value_heads = kv * times
    state = {}
    for name, tensor in model.state_dict().items():
        if name.rsplit(".", 2)[-2] in ("k_proj", "v_proj"):
            heads = tensor.unflatten(0, (kv, -1))
            state[name] = heads.repeat_interleave(times, 0).flatten(0, 1)
        else:
            state[name] = tensor
    any_parameter = next(model.parameters())
    with torch.device(any_parameter.device):
        made = type(model)(config).to(any_parameter.dtype)
    made.load_state_dict(state, assign=True)
    return made


class Quantized(nn.Module):
    """y = x (w s)^T + b with int8 weights w [out, in] and scales s [out]."""

    def __init__(self, product: nn.Linear) -> None:
        super().__init__()
        weight = product.weight.detach()
        scale = weight.abs().amax(1) / 127
        self.weight = nn.Buffer((weight / scale.unsqueeze(1)).round().to(torch.int8))
        self.scale = nn.Buffer(scale)
        self.bias = product.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return linear(x, self.weight.to(x.dtype) * self.scale.unsqueeze(1), self.bias)


def quantize(model: Any) -> Any:
    """A copy of a prepared decoder whose layers' linear products hold int8 weights."""
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name and "router" not in name:
            made.set_submodule(name, Quantized(module))
    return made


def export_step(ready: Any, phase: Phase, batch: int, tokens: int) -> tuple[Exported, OpGraph]:
    """A prefill of `tokens`, or a decode step against a cache of so many; with its graph.

    `ready` is a prepared decoder; shapes are those of the whole deployment.
    """
    device = next(ready.parameters()).device
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    if phase == "prefill":
        found = exported_of(export(Prefill(ready), [ids]))
    else:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            caches = Prefill(ready)(ids)[1:]
        held = [torch.empty(one.shape, dtype=one.dtype, device=device) for one in caches]
        found = exported_of(export(Decode(ready), [ids[:, :1], *held]))
    return found, opgraph_of(found)


def export(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """The `ExportedProgram` of a step."""
    with torch.no_grad():
        return torch.export.export(module, tuple(inputs), strict=False)
