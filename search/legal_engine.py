"""Layout rules of single engines: what vLLM, its Ascend plugin and MindIE can start.

An engine starts each replica as a deployment of its own, so "one deployment" below is one replica.
A module has a size of its own when that size is neither 0 nor tp.

Left out, for want of a source: how many ranks MindIE starts a node, what TensorRT-LLM refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from shardplan.models.parallel import AXES, Axis, Parallelism
from shardplan.search.legal_layout import fast_ranks, is_sent, replica_ranks
from shardplan.search.rulebook import Subject, family_name, rules, value

__all__ = ["ENGINE_RULES", "engine_order", "live_axes"]

_VLLM_ORDER: tuple[Axis, ...] = ("dp", "pp", "cp", "tp")


def _copy_ranks(s: Subject) -> int:
    """Ranks of one data-parallel group."""
    return s.parallel.tp * s.parallel.pp * s.parallel.cp


def _groups(par: Parallelism) -> int:
    """Data-parallel groups of one replica."""
    return par.dp // par.replicas


def _shares_experts(par: Parallelism) -> bool:
    return par.ep > par.tp * par.cp


def _kv_heads(s: Subject) -> bool:
    tp, kv = s.parallel.tp, s.spec.kv_heads
    return s.spec.mla is not None or kv % tp == 0 or tp % kv == 0


def _ep_engine(s: Subject) -> bool:
    par = s.parallel
    if par.ep == 1:
        return True
    group = par.tp * par.cp
    return par.ep % group == 0 and par.dp % (par.ep // group) == 0


def _whole_nodes(s: Subject) -> bool:
    node, total = s.cluster.ranks_per_node, s.parallel.ranks
    for size in (_copy_ranks(s), replica_ranks(s)):
        if size > node:
            if size % node:
                return False
        elif node % size and total > node:
            return False
    return True


def _order(s: Subject) -> bool:
    par = s.parallel
    return live_axes(par, par.order) == live_axes(par, _VLLM_ORDER)


def live_axes(par: Parallelism, order: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Axes of more than one rank, in an order: two orders with the same ones are alike."""
    return tuple(axis for axis in order if getattr(par, axis) > 1)


def engine_order(engine: str) -> tuple[Axis, ...]:
    """The order in which an engine numbers ranks unless told otherwise."""
    bound = rules()["order-engine"].engines
    return _VLLM_ORDER if engine in bound else AXES


def _own(size: int, tp: int) -> bool:
    return size not in (0, tp)


def _sized(par: Parallelism) -> tuple[int, ...]:
    """Sizes of the modules that have one of their own, shared experts apart."""
    sizes = (par.o_tp, par.ffn_tp, par.head_tp, par.embed_tp)
    return tuple(size for size in sizes if _own(size, par.tp))


def _vllm_modules(s: Subject) -> bool:
    return not _sized(s.parallel) and not _own(s.parallel.shared_tp, s.parallel.tp)


def _fine_shared(s: Subject) -> bool:
    par = s.parallel
    whole = par.shared_tp == 1 and par.ep > 1 and par.sp
    return not _own(par.shared_tp, par.tp) or whole


def _mtp_multiple(s: Subject) -> bool:
    mtp, layers = s.parallel.mtp, s.spec.mtp_layers
    return mtp <= layers or layers == 0 or mtp % layers == 0


def _mc2_experts(s: Subject) -> bool:
    return s.spec.moe is None or s.spec.moe.experts <= value("mc2-experts", "experts")


def _mc2_topk(s: Subject) -> bool:
    return s.spec.moe is None or bool(s.spec.moe.experts_per_token <= value("mc2-topk", "topk"))


def _mc2_hidden(s: Subject) -> bool:
    low, high = value("mc2-hidden", "low"), value("mc2-hidden", "high")
    return bool(low <= s.spec.hidden <= high)


def _mc2_hidden_a2(s: Subject) -> bool:
    step, high = value("mc2-hidden-a2", "step"), value("mc2-hidden-a2", "high")
    return bool(s.spec.hidden <= high and s.spec.hidden % step == 0)


def _sent_a2(s: Subject) -> bool:
    moe, ep = s.spec.moe, s.parallel.ep
    most = value("sent-a2", "experts_a_rank")
    return moe is None or (ep >= value("sent-a2", "ranks") and moe.experts // ep <= most)


def _most_ranks(s: Subject) -> bool:
    return bool(s.parallel.ep <= value("mc2-ranks", "most")[family_name(s.cluster.device)])


def _mc2_roce(s: Subject) -> bool:
    ep = s.parallel.ep
    return ep <= fast_ranks(s.cluster) or ep in value("mc2-roce", "ranks")


def _where_sent(holds: Callable[[Subject], bool]) -> Callable[[Subject], bool]:
    """A rule that only binds where tokens are sent to experts."""
    return lambda s: not is_sent(s) or holds(s)


def _local(size: int, s: Subject) -> bool:
    """A module of MindIE's own: DeepSeek alone, inside a node."""
    inside = size <= s.cluster.ranks_per_node
    return not _own(size, s.parallel.tp) or (s.spec.mla is not None and inside)


_VLLM: Mapping[str, Callable[[Subject], bool]] = {
    "kv-heads": _kv_heads,
    "ep-engine": _ep_engine,
    "whole-nodes": _whole_nodes,
    "order-engine": _order,
    "mtp-multiple": _mtp_multiple,
    "modules-vllm": _vllm_modules,
    "cp-dp": lambda s: s.parallel.cp == 1 or _groups(s.parallel) == 1,
}

_ASCEND: Mapping[str, Callable[[Subject], bool]] = {
    "no-910a": lambda _: False,
    "ep-310p": lambda s: s.parallel.ep == 1,
    "mla-310p": lambda s: s.spec.mla is None,
    "ep-spanning": lambda s: (
        not _shares_experts(s.parallel) or _copy_ranks(s) <= s.cluster.ranks_per_node
    ),
    "gathered-a3": lambda s: s.parallel.ep == 1 or is_sent(s),
    "sent-a2": _where_sent(_sent_a2),
    "mc2-ranks-a2": _where_sent(lambda s: s.parallel.ep in value("mc2-ranks-a2", "ranks")),
    "mc2-ranks": _where_sent(_most_ranks),
    "mc2-hidden-a2": _where_sent(_mc2_hidden_a2),
    "mc2-hidden": _where_sent(_mc2_hidden),
    "mc2-topk": _where_sent(_mc2_topk),
    "mc2-experts": _where_sent(_mc2_experts),
    "mc2-roce": _where_sent(_mc2_roce),
    "mc2-ub": _where_sent(lambda s: s.parallel.ep <= fast_ranks(s.cluster)),
    "sp-experts": lambda s: not s.parallel.sp or s.spec.moe is None or s.parallel.ep > 1,
    "mtp-pp": lambda s: s.parallel.mtp == 0 or s.parallel.pp == 1 or s.role == "prefill",
    "fine-experts": lambda s: s.spec.moe is not None or not _sized(s.parallel),
    "fine-dp": lambda s: all(_groups(s.parallel) % size == 0 for size in _sized(s.parallel)),
    "fine-o": lambda s: not _own(s.parallel.o_tp, s.parallel.tp) or s.parallel.tp == 1,
    "fine-o-graph": lambda s: not _own(s.parallel.o_tp, s.parallel.tp),
    "fine-decode": lambda s: (
        s.role == "decode"
        or not (_own(s.parallel.o_tp, s.parallel.tp) or _own(s.parallel.embed_tp, s.parallel.tp))
    ),
    "fine-shared": _fine_shared,
}

_MINDIE: Mapping[str, Callable[[Subject], bool]] = {
    "pp-engine": lambda s: s.parallel.pp == 1,
    "ep-mindie": lambda s: s.parallel.ep == 1 or s.spec.mla is not None,
    "sent-mindie": _where_sent(lambda s: s.parallel.ep % (s.parallel.tp * s.parallel.cp) == 0),
    "dp-mindie": lambda s: _groups(s.parallel) == 1,
    "cp-mindie": lambda s: s.parallel.cp in value("cp-mindie", "sizes"),
    "cp-mindie-model": lambda s: s.parallel.cp == 1 or s.spec.mla is not None,
    "cp-mindie-device": lambda s: s.parallel.cp == 1,
    "sp-mindie": lambda s: not s.parallel.sp,
    "mtp-mindie-device": lambda s: s.parallel.mtp == 0,
    "mtp-mindie-cp": lambda s: s.parallel.cp == 1 or s.parallel.mtp <= 1 or s.role == "prefill",
    "head-mindie": lambda s: _local(s.parallel.head_tp, s),
    "o-mindie": lambda s: (
        _local(s.parallel.o_tp, s)
        and (s.parallel.tp == 1 or not _own(s.parallel.o_tp, s.parallel.tp))
    ),
    "modules-mindie": lambda s: (
        not any(
            _own(size, s.parallel.tp)
            for size in (s.parallel.ffn_tp, s.parallel.shared_tp, s.parallel.embed_tp)
        )
    ),
}

ENGINE_RULES: Mapping[str, Callable[[Subject], bool]] = MappingProxyType(
    {**_VLLM, **_ASCEND, **_MINDIE}
)
