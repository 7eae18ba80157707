"""Engine profiles: what a serving engine fuses, keeps back and schedules (`data/engines`).

A profile turns kernel times into the time of a step, and a card's memory into a KV budget:

    step_s  = sum of kernels + launch_gap_s * kernels + step_host_s     (decode)
              and `prefill_step_host_s` in place of `step_host_s`       (prefill)
    floor   = device.launch_s where the phase replays a captured graph, else device.host_launch_s
    late    = step_skew_s * (ranks of a tp group - 1)     in the step's collectives (decode)
              and `prefill_step_skew_s` in place of it    (prefill)
    TTFT    = wait + prefill + request_host_s + request_steps * mean step
    budget  = memory_fraction * hbm_bytes - weights - activations - reserve_bytes
              - communicator_bytes * communicators

Fusions (kernels that the engine merges into one):

    qkv                query, key and value projections in one matmul
    gate_up            the two input projections of a gated feed-forward network in one matmul
    swiglu             activation and product in one kernel
    add_rmsnorm        residual add and RMS norm in one kernel
    qk_norm_rope       query and key norms and rotary embedding in one kernel
    norm_quant         quantization of a linear layer's input inside the norm that feeds it
    act_quant          the same inside the activation of a feed-forward network
    attention_quant    the same inside attention
    mla_kv_norm_rope   latent norm, rotary part and cache write of MLA in one kernel
    cache_write        keys and values of a layer written to the cache by one kernel
    attention_rope     rotary embedding (without norms of its own) and cache write in the kernel
                       that prepares attention, which its benchmark runs with it
    all_reduce_norm    a decode step's all_reduce and the residual add and norm after it

Switches that an engine may have and leaves off unless told (`overlap` prices them; a file may
leave them out, the engine then has none):

    weight_prefetch    products whose weights it can bring into L2 while other kernels run:
                       gate_up and down of models without experts, experts (their gate and up),
                       qkv_a (down projections of MLA); none
    fused_collectives  weight dtypes for which a product and the all_reduce of its result can be
                       one kernel; none
    mtp_max            tokens predicted ahead in a decode step, at most, by the layer that models
                       of `mtp_architectures` (any) ship for it; 0

A captured graph keeps `graph_bytes` of a rank's memory (0: not known), and `graph_sizes` are the
batches of which the engine captures one unless told (empty: not known).

Of an engine that lets prompts go first, `max_prefill_seqs` is the most prompts of one step; the
simulator alone heeds it, the steady state computes one prompt at a time.

`late` is what the ranks of a step wait for the last of them: an engine with one process a rank
starts its kernels at different times, and the first collectives absorb it (of 129 all_reduces of a
measured decode step on 16 dies the median took 20 us, the mean 82 us). It belongs to the host and
its engine, not to the links: a graph replayed by one process has none. One host starts the
processes of all its ranks, so it grows with their number: on 4 dies a step is late by a fifth of
what it is on 16, which published throughput there bears out.

`request_host_s` is what lies between a client and the scheduler, there and back: HTTP, tokenizer,
the first token's way out. `request_steps` is how many steps pass on that way: a prompt comes while
a step runs, and an engine that prepares the next step meanwhile (an overlap scheduler) takes it up,
and hands out what a step made, a step late. `fp8_cache` engines take the number format of the cache
from an fp8 checkpoint that a 16-bit model was quantized to.

Left out: how the front end slows with load, sampling parameters, fragmentation of the KV blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shardplan.costmodel.datafile import (
    Field,
    check_keys,
    flag,
    is_file_name,
    label,
    number,
    read_facts,
    read_shipped,
    read_toml,
    shipped_names,
)
from shardplan.costmodel.hardware import Fact
from shardplan.models.graph import Phase

__all__ = [
    "ENGINE_FIELDS",
    "FUSIONS",
    "EngineProfile",
    "engine_from_table",
    "engine_names",
    "load_engine",
]

FUSIONS = (
    "qkv",
    "gate_up",
    "swiglu",
    "add_rmsnorm",
    "qk_norm_rope",
    "norm_quant",
    "act_quant",
    "attention_quant",
    "mla_kv_norm_rope",
    "cache_write",
    "attention_rope",
    "all_reduce_norm",
)

ATTENTION = ("flash", "naive")

PREFETCHED = ("none", "gate_up", "down", "experts", "qkv_a")
BEHIND = ("vector", "collective")
FUSED_DTYPES = ("none", "bf16", "fp16", "w8a16", "w8a8", "w4a16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """One engine in one mode."""

    name: str
    title: str
    fused: tuple[str, ...]
    """Fusions that it applies, of `FUSIONS`."""
    attention: tuple[str, ...]
    """Attention kernels that it runs, of `ATTENTION`."""
    prefill_graph: bool
    """Prefill steps replay a captured graph."""
    decode_graph: bool
    """Decode steps replay a captured graph."""
    step_host_s: float
    """Host time of a decode step that the device waits for, seconds."""
    prefill_step_host_s: float
    """Host time of a prefill step that the device waits for, seconds."""
    launch_gap_s: float
    """Idle time of the device between two kernels, seconds."""
    kv_block_tokens: int
    memory_fraction: float
    """Part of the card's memory that the engine takes."""
    reserve_bytes: float
    """Runtime, captured graphs and workspaces inside that part, bytes."""
    communicator_bytes: float
    """Buffers of one communicator, bytes."""
    chunked_prefill: bool
    """A long prompt is split over steps and shares them with decoding requests."""
    prefill_first: bool
    """A waiting prompt stops decoding until it is done."""
    max_num_batched_tokens: int
    """Tokens of one step, default."""
    max_num_seqs: int
    """Requests that decode together, default."""
    prefix_cache: bool
    """Shared prompt prefixes are kept and found again, default."""
    sampling: bool
    """A step ends with sampling kernels (sort, softmax, argmax over the vocabulary)."""
    facts: Mapping[str, Fact]
    step_skew_s: float = 0.0
    """What a decode step waits for its last rank, for each rank beyond the first, seconds."""
    prefill_step_skew_s: float = 0.0
    """The same of a prefill step, seconds."""
    request_host_s: float = 0.0
    """What a request waits for beside steps before its first token, seconds."""
    request_steps: float = 0.0
    """Steps that pass beside those of its prompt before a request's first token is handed out."""
    fp8_cache: bool = False
    """The cache is fp8 unless said otherwise where weights were quantized to fp8."""
    preempts: bool = False
    """A prompt is admitted when its own blocks are free; a request that finds none later on is put
    back and computed again."""
    sequence_parallel_tokens: int = 0
    """Tokens of a prefill step above which the engine can split them over tp between the matrix
    products; 0: it cannot. The price of one such step is that of the faster way; serving and
    search take what the strategy says, as the engine does."""
    weight_prefetch: tuple[str, ...] = ("none",)
    """Products whose weights it can prefetch, of `PREFETCHED`."""
    weight_prefetch_behind: tuple[str, ...] = ("vector",)
    """Kernels behind which it does, of `BEHIND`."""
    weight_prefetch_bytes: float = 0.0
    """Most that it prefetches of one product."""
    weight_prefetch_tokens: int = 2**26
    """Steps of more tokens do not prefetch."""
    fused_collectives: tuple[str, ...] = ("none",)
    """Weight dtypes of its fused product and all_reduce, of `FUSED_DTYPES`."""
    fused_collectives_default: bool = False
    """That kernel is on unless switched off."""
    max_prefill_seqs: int = 1 << 20
    """Prompts of one step, where they go first."""
    mtp_max: int = 0
    """Most tokens that it predicts ahead with a model's own prediction layer; 0: none."""
    mtp_architectures: tuple[str, ...] = ("any",)
    """Models with which it does."""
    graph_bytes: float = 0.0
    """Memory of one captured graph on a rank; 0: not known."""
    graph_sizes: tuple[int, ...] = ()
    """Batches that it captures decode graphs of by itself, ascending; empty: not known."""

    def skew_s(self, phase: Phase, ranks: int) -> float:
        """What a step waits for the last of `ranks` ranks, seconds."""
        each = self.step_skew_s if phase == "decode" else self.prefill_step_skew_s
        return each * (ranks - 1.0)


_RANKS: Mapping[str, Field] = {
    "step_skew_us": number("step_skew_s", low=0, high=1e7, scale=1e-6, optional=True),
    "prefill_step_skew_us": number(
        "prefill_step_skew_s", low=0, high=1e7, scale=1e-6, optional=True
    ),
    "request_host_us": number("request_host_s", low=0, high=1e7, scale=1e-6, optional=True),
    "request_steps": number("request_steps", low=0, high=1000, optional=True),
    "preempts": Field(target="preempts", shape="flag", optional=True),
    "fp8_cache": Field(target="fp8_cache", shape="flag", optional=True),
    "sequence_parallel_tokens": number(
        "sequence_parallel_tokens", low=0, high=2**31 - 1, whole=True, optional=True
    ),
}

_SWITCHES: Mapping[str, Field] = {
    "weight_prefetch": Field(
        target="weight_prefetch", shape="words", choices=PREFETCHED, optional=True
    ),
    "weight_prefetch_behind": Field(
        target="weight_prefetch_behind", shape="words", choices=BEHIND, optional=True
    ),
    "weight_prefetch_mib": number(
        "weight_prefetch_bytes", low=0, high=1024, scale=2.0**20, optional=True
    ),
    "weight_prefetch_tokens": number(
        "weight_prefetch_tokens", low=1, high=2**26, whole=True, optional=True
    ),
    "fused_collectives": Field(
        target="fused_collectives", shape="words", choices=FUSED_DTYPES, optional=True
    ),
    "fused_collectives_default": Field(
        target="fused_collectives_default", shape="flag", optional=True
    ),
    "max_prefill_seqs": number("max_prefill_seqs", low=1, high=2**20, whole=True, optional=True),
    "mtp_max": number("mtp_max", low=0, high=64, whole=True, optional=True),
    "mtp_architectures": Field(target="mtp_architectures", shape="words", optional=True),
    "graph_mib": number("graph_bytes", low=0, high=65536, scale=2.0**20, optional=True),
    "graph_sizes": Field(target="graph_sizes", shape="counts", low=1, high=2**20, optional=True),
}

_ENGINE: Mapping[str, Field] = {
    "fused": Field(target="fused", shape="words", choices=FUSIONS),
    "attention": Field(target="attention", shape="words", choices=ATTENTION),
    "prefill_graph": flag("prefill_graph"),
    "decode_graph": flag("decode_graph"),
    "step_host_us": number("step_host_s", low=0, high=1e7, scale=1e-6),
    "prefill_step_host_us": number("prefill_step_host_s", low=0, high=1e7, scale=1e-6),
    "launch_gap_us": number("launch_gap_s", low=0, high=1e6, scale=1e-6),
    "kv_block_tokens": number("kv_block_tokens", low=1, high=65536, whole=True),
    "memory_fraction": number("memory_fraction", low=0.05, high=1),
    "reserve_gib": number("reserve_bytes", low=0, high=1024, scale=2.0**30),
    "communicator_mib": number("communicator_bytes", low=0, high=65536, scale=2.0**20),
    "chunked_prefill": flag("chunked_prefill"),
    "prefill_first": flag("prefill_first"),
    "max_num_batched_tokens": number("max_num_batched_tokens", low=1, high=2**26, whole=True),
    "max_num_seqs": number("max_num_seqs", low=1, high=2**20, whole=True),
    "prefix_cache": flag("prefix_cache"),
    "sampling": flag("sampling"),
}
ENGINE_FIELDS: Mapping[str, Field] = {**_ENGINE, **_RANKS, **_SWITCHES}
"""Facts of an engine file."""


def engine_names() -> tuple[str, ...]:
    """Names of the engine profiles that ship, sorted."""
    return shipped_names("engines")


def load_engine(name_or_path: str | Path) -> EngineProfile:
    """A shipped profile by name (case ignored), or one from a TOML file.

    `UnknownNameError` for a name that does not ship, `DataFileError` for a file that breaks a rule.
    """
    if is_file_name(name_or_path):
        path = Path(name_or_path)
        return engine_from_table(read_toml(path, "engine"), str(path))
    return _shipped_engine(str(name_or_path).lower())


@functools.cache
def _shipped_engine(name: str) -> EngineProfile:
    table = read_shipped("engines", "engine profile", name)
    return engine_from_table(table, f"engines/{name}.toml")


def engine_from_table(table: Mapping[str, object], where: str) -> EngineProfile:
    """The profile that a parsed file describes; `where` names the file in errors."""
    check_keys(table, ["name", "title", *_ENGINE], [*_RANKS, *_SWITCHES], where)
    read = read_facts(table, ENGINE_FIELDS, where)
    values: dict[str, Any] = dict(read.values)
    return EngineProfile(
        name=label(table, "name", where),
        title=label(table, "title", where),
        facts=MappingProxyType(dict(read.facts)),
        **values,
    )
