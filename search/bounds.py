"""What no strategy of a layout can reach, without applying or pricing it.

A rank multiplies at most at its device's peak rate F, and each token costs f operations in the
layers' products alone. A dp group of a layout has tp * pp ranks that share a token (and cp that
share the tokens of a prompt), so with I' prompt tokens left after prefix hits, O output tokens:

    a request takes the group at least   w = (I' / cp + O - 1) f / (tp pp F)      of its time
    throughput  <= dp O / w
    latency     >= I' f / (tp pp cp F) + (O - 1) f / (tp F)

(one token passes all stages one after another: pp does not help it). Whatever the cost model adds
(memory, collectives, launches, waiting, padding) only makes this larger; a test holds the price of
products on every device against F. Embedding, LM head, norms and attention are left out of f: a
bound may be loose, never wrong.
"""

from __future__ import annotations

import functools
import math

from shardplan.costmodel.hardware import Device
from shardplan.models.build import build_graph
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.evaluate import Question

__all__ = ["layer_flop_per_token", "most_objective", "peak_flop_per_s"]

_SIXTEEN_BIT = ("bf16", "fp16")
_WIDE = ("bf16", "fp16", "w8a16", "w4a16")
"""Weight types whose products run at the 16-bit rate."""


@functools.cache
def layer_flop_per_token(spec: ModelSpec) -> float:
    """Operations of one token in the matrix products of all layers, routed experts by topk."""
    graph = build_graph(spec, "decode")
    total = 0.0
    for name in graph.layers:
        for op in graph.blocks[name].ops():
            if op.kind == "matmul" and op.weight:
                total += 2.0 * graph.size(op.weight) * op.density
    return total


def peak_flop_per_s(device: Device, weight_dtype: str) -> float:
    """Highest matrix rate that products with weights of this type could run at."""
    rates = device.flop_per_s
    words = [part.rpartition("=")[2] for part in weight_dtype.split(",")]
    if all(word in _WIDE for word in words):
        return max(rates.get(name, 0.0) for name in _SIXTEEN_BIT)
    return max(rates.values())


def most_objective(question: Question, par: Parallelism, weight_dtype: str) -> float:
    """An objective that no strategy of the layout exceeds."""
    work = question.workload
    prompt = max(math.ceil(work.input_len * (1.0 - work.prefix_hit)), 1)
    later = work.output_len - 1
    token_s = layer_flop_per_token(question.spec) / peak_flop_per_s(
        question.cluster.device, weight_dtype
    )
    if question.objective == "latency":
        return 1.0 / (token_s * (prompt / (par.tp * par.pp * par.cp) + later / par.tp))
    busy_s = token_s * (prompt / par.cp + later) / (par.tp * par.pp)
    return par.dp * work.output_len / busy_s
