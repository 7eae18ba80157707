"""How a model is split: axis sizes, the mesh they form, and the one table from role to dims.

A `Parallelism` names axis sizes; a `Mesh` factors them into sub-axes, major to minor:

    dp = dp0 * dp1 * ...      cut at each number of groups that share experts or modules
    cp = cp0 * cp1            cp1: the context-parallel ranks that share experts
    tp = tp0 * tp1 * tp2      cut where kv heads run out and where experts run out

so that "K on the first part of tp, G on the rest" (tensor parallelism beyond the kv heads) and
"E on dp1 and part of tp, I on the rest of tp" (expert parallelism) are plain assignments
{sub-axis: dim}. `assignment` is the whole strategy of an operator.

Context parallelism cuts the new tokens of a prompt in prefill, where attention gathers the keys
and values (or the latent) of all, and the cache in both phases. In decode every rank of a context
has the step's tokens, attends to its part of the cache, and the parts are merged by their
log-sum-exp (`shardplan.models.context`). Pieces of a prompt are runs of tokens here; engines deal
head and tail pieces to a rank (zig-zag), which balances the causal half, moves and holds the same,
and is what the price assumes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shardplan.models.errors import LayoutError
from shardplan.models.graph import Op, Phase
from shardplan.models.modules import (
    MODULES,
    check_expert_groups,
    check_modules,
    data_widths,
    expert_groups,
    groups_of,
    module_is_whole,
    o_dim,
)
from shardplan.models.spec import ModelSpec

__all__ = [
    "AXES",
    "Axis",
    "Exchange",
    "Mesh",
    "Parallelism",
    "Roles",
    "assignment",
    "balanced_stages",
    "carry",
    "check_pipeline",
    "make_mesh",
    "roles_of",
]

Exchange = Literal["allgather", "alltoall"]
Axis = Literal["pp", "dp", "cp", "tp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "cp", "tp")
"""Axes that ranks are numbered by, in the order of `Parallelism.order` unless told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """Axis sizes of one deployment; tp * pp * dp * cp ranks.

    dp: attention data-parallel groups. ep: ranks that share the experts, 1 = experts split by tp
    within each dp group. sp: tokens split over tp between the matrix products.
    cp: ranks that share the tokens of a prompt and the cache of its sequence.
    stage_layers: layers of each pipeline stage; empty means balanced.
    o_tp, ffn_tp, shared_tp, head_tp, embed_tp: ranks that one module is split over, 0 for tp.
    order: axes from the one whose neighbours are farthest apart to the one whose ranks follow
    one another. mtp: tokens that are predicted ahead and verified in each decode step.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    sp: bool = False
    exchange: Exchange = "allgather"
    """How tokens reach experts of other dp groups: gathered everywhere, or sent where needed."""
    stage_layers: tuple[int, ...] = ()
    o_tp: int = 0
    ffn_tp: int = 0
    shared_tp: int = 0
    head_tp: int = 0
    embed_tp: int = 0
    order: tuple[Axis, ...] = AXES
    mtp: int = 0

    @property
    def ranks(self) -> int:
        """Ranks of the deployment."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def replicas(self) -> int:
        """Independent copies of the deployment: dp groups that share experts form one of them."""
        return max(self.dp // max(self.ep // (self.tp * self.cp), 1), 1)

    def describe(self) -> str:
        """A short name: `tp4 pp2 dp1 ep1`."""
        words = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}"]
        if self.ep > 1:
            words.append(f"ep{self.ep}")
        if self.cp > 1:
            words.append(f"cp{self.cp}")
        if self.sp:
            words.append("sp")
        if self.ep > 1 and self.exchange == "alltoall":
            words.append("a2a")
        words += [f"{one}{size}" for one in MODULES if (size := getattr(self, f"{one}_tp"))]
        if self.mtp:
            words.append(f"mtp{self.mtp}")
        if self.order != AXES:
            words.append(">".join(self.order))
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sub-axes of one pipeline stage, major to minor, and which logical group each serves."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    groups: dict[str, tuple[str, ...]]
    known: dict[tuple[tuple[str, str], ...], dict[str, int]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Ways of layouts that were asked for."""

    def ways(self, layout: tuple[tuple[str, str], ...]) -> Mapping[str, int]:
        """How many ways a layout of (axis, dim) cuts each dim; dims it does not name are whole."""
        found = self.known.get(layout)
        if found is None:
            found = self.known[layout] = {}
            for axis, dim in layout:
                found[dim] = found.get(dim, 1) * self.shape[self.axes.index(axis)]
        return found

    @property
    def ranks(self) -> int:
        """Ranks of one stage."""
        return math.prod(self.shape)

    def size(self, axes: tuple[str, ...]) -> int:
        """Ranks that one group over these sub-axes joins."""
        return math.prod(self.shape[self.axes.index(a)] for a in axes)


def _divides(rule: str, small: int, large: int, small_name: str, large_name: str) -> None:
    if small < 1 or large % small:
        tries = [str(d) for d in range(1, large + 1) if large % d == 0][:12]
        raise LayoutError(
            rule, got=f"{small_name}={small}, {large_name}={large}", hint="try " + ", ".join(tries)
        )


def _check_sizes(spec: ModelSpec, par: Parallelism) -> None:
    for name in ("tp", "pp", "dp", "ep", "cp"):
        if getattr(par, name) < 1:
            raise LayoutError("an axis size is 1 or more", got=f"{name}={getattr(par, name)}")
    if par.mtp < 0 or (par.mtp and not spec.mtp_layers):
        raise LayoutError(
            "tokens are predicted ahead by the layer that a model ships for it, 0 of them without",
            got=f"mtp={par.mtp}, model={spec.name}, mtp_layers={spec.mtp_layers}",
            hint="use mtp=0",
        )
    if par.order != AXES and sorted(par.order) != sorted(AXES):
        raise LayoutError(
            "order names every axis once", got=f"order={par.order}", hint="try " + ",".join(AXES)
        )
    if par.cp > 1 and spec.sliding_layers:
        raise LayoutError(
            "context parallelism needs layers that see the whole context",
            got=f"cp={par.cp}, layers with a sliding window: {spec.sliding_layers}",
            hint="use cp=1",
        )
    _divides("tp must divide num_attention_heads", par.tp, spec.heads, "tp", "heads")
    if not (par.embed_tp and par.head_tp):
        _divides("tp must divide vocab_size", par.tp, spec.vocab, "tp", "vocab_size")
    if spec.dense_layers and not par.ffn_tp:
        _divides("tp must divide intermediate_size", par.tp, spec.ffn, "tp", "intermediate_size")
    _check_experts(spec, par)
    check_modules(spec, par)


def check_pipeline(spec: ModelSpec, par: Parallelism) -> None:
    """`LayoutError` unless every stage gets at least one layer and all layers a stage."""
    if par.pp > spec.layers:
        raise LayoutError(
            "a pipeline stage holds at least one layer",
            got=f"pp={par.pp}, layers={spec.layers}",
            hint=f"try pp of at most {spec.layers}",
        )
    if par.stage_layers and (
        len(par.stage_layers) != par.pp
        or sum(par.stage_layers) != spec.layers
        or min(par.stage_layers) < 1
    ):
        raise LayoutError(
            "stage_layers holds one positive count a stage and sums to the layers",
            got=f"stage_layers={par.stage_layers}, pp={par.pp}, layers={spec.layers}",
        )


def _check_experts(spec: ModelSpec, par: Parallelism) -> None:
    if spec.moe is None:
        if par.ep > 1:
            raise LayoutError(
                "expert parallelism needs a model with experts",
                got=f"ep={par.ep}, model={spec.name}",
                hint="use ep=1",
            )
        return
    _divides("ep must divide the number of experts", par.ep, spec.moe.experts, "ep", "experts")
    if par.ep > par.tp:
        check_expert_groups(par)
    else:
        _divides("ep up to tp must divide tp", par.ep, par.tp, "ep", "tp")
    split = par.tp // min(par.ep, par.tp)
    _divides("tp/ep must divide the expert width", split, spec.moe.ffn, "tp/ep", "expert width")
    if spec.moe.shared_ffn and not par.shared_tp:
        _divides(
            "tp must divide the shared experts' width",
            par.tp,
            spec.moe.shared_ffn,
            "tp",
            "shared width",
        )


def _kv_split(spec: ModelSpec, tp: int) -> int:
    """How many ways tp splits the kv heads; the rest of tp splits the queries of each.

    The rest divides the queries because tp divides the heads, their product with the kv heads.
    """
    return tp if spec.mla is not None else math.gcd(tp, spec.kv_heads)


def make_mesh(spec: ModelSpec, par: Parallelism) -> Mesh:
    """The mesh of one stage. `LayoutError` names the rule that a size breaks."""
    _check_sizes(spec, par)
    kv, ep = _kv_split(spec, par.tp), min(par.ep, par.tp) if spec.moe else par.tp
    low, high = sorted((kv, ep))
    if high % low or par.tp % high:
        raise LayoutError(
            "tp must factor through both the kv heads and the expert groups",
            got=f"tp={par.tp}, kv split={kv}, expert split={ep}",
            hint="try an ep that divides the kv split, or is a multiple of it",
        )
    shape = {
        **_factors("dp", par.dp, data_widths(par)),
        **_factors("cp", par.cp, expert_groups(par)[:1]),
        "tp0": low,
        "tp1": high // low,
        "tp2": par.tp // high,
    }
    cut = {low: ("tp0",), high: ("tp0", "tp1"), par.tp: ("tp0", "tp1", "tp2")}
    axes = tuple(name for name, size in shape.items() if size > 1)
    groups = _groups(spec, par, shape, axes)
    groups["kv"] = tuple(a for a in cut[kv] if a in axes)
    groups["tpe"] = tuple(a for a in cut[ep] if a in axes) if par.ep > 1 else ()
    groups["q"] = tuple(a for a in groups["tp"] if a not in groups["kv"])
    groups["tpf"] = tuple(a for a in groups["tp"] if a not in groups["tpe"])
    groups["ep"] = groups["dp1"] + groups["cp1"] + groups["tpe"]
    return Mesh(axes, tuple(shape[a] for a in axes), groups)


def _groups(
    spec: ModelSpec, par: Parallelism, shape: dict[str, int], axes: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """Sub-axes of dp, cp and tp, and of what neighbouring groups share."""
    data, context, tensor = (
        tuple(a for a in axes if a.startswith(kind)) for kind in ("dp", "cp", "tp")
    )
    within, among = expert_groups(par)
    groups = {"dp": data, "cp": context, "tp": tensor, "oK": (), "oD": ()}
    groups["dp1"] = _minor(data, among, shape)
    groups["dp0"] = tuple(a for a in data if a not in groups["dp1"])
    groups["cp1"] = _minor(context, within, shape)
    groups["o" + o_dim(spec, par)] = _minor(data, groups_of(par, "o"), shape)
    for module in MODULES:
        shared = _minor(data, groups_of(par, module), shape)
        groups[f"{module}+"] = shared
        groups[module] = () if module_is_whole(par, module) else shared + tensor
    return groups


def _factors(kind: str, size: int, widths: tuple[int, ...]) -> dict[str, int]:
    """Sub-axes of one axis, major to minor, cut at the widths (the narrowest first)."""
    outer = (size, *reversed(widths))
    inner = (*reversed(widths), 1)
    return {f"{kind}{i}": a // b for i, (a, b) in enumerate(zip(outer, inner, strict=True))}


def _minor(axes: tuple[str, ...], width: int, shape: dict[str, int]) -> tuple[str, ...]:
    """The minor sub-axes whose ranks number `width`."""
    first = len(axes)
    while width > 1:
        first -= 1
        width //= shape[axes[first]]
    return axes[first:]


_TOKEN_DIM: dict[Phase, str] = {"prefill": "T", "decode": "B"}


Roles = Mapping[str, Sequence[tuple[str, str]]]
"""Role -> [(group, dim)] beyond the split of batch and prompt: the strategy in one table."""


def roles_of(par: Parallelism, phase: Phase) -> Roles:
    """The strategy of one layout in one phase."""
    token = _TOKEN_DIM[phase]
    tokens = [("tp", token)] if par.sp else []
    sent = par.exchange == "alltoall" and par.ep > 1
    home = [("cp1", token), ("tpe", token)] if sent else []
    exchange = home if sent else [("ep", "E")]
    heads = [("kv", "K"), ("q", "G")]
    return {
        "input": [],
        "embedding": _module(par, "embed", "V", tokens),
        "token": tokens,
        "stat": heads,
        "heads": [*heads, ("cp", "W")],
        "kv_heads": [("kv", "K"), ("cp", "S")],
        "latent": [("cp", "S")],
        "o": tokens if module_is_whole(par, "o") else [*heads, ("oK", "K"), ("oD", "D")],
        "ffn": _module(par, "ffn", "F", tokens),
        "shared": _module(par, "shared", "X", home or tokens),
        "router": tokens,
        "dispatch": exchange,
        "expert": [("ep", "E"), ("tpf", "I")],
        "combine": exchange,
        "moe_sum": home,
        "select": [],
        "head": _module(par, "head", "V", []),
    }


def _module(
    par: Parallelism, module: str, dim: str, tokens: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """A module's weights cut over its ranks; held whole, it takes the tokens as they lie."""
    return tokens if module_is_whole(par, module) else [(module, dim)]


def assignment(op: Op, mesh: Mesh, roles: Roles, phase: Phase) -> dict[str, str]:
    """{sub-axis: named dim} of one operator: its whole strategy; `roles`: as of `roles_of`.

    Only dims that the operator has (kept or contracted) are assigned; the rest of the mesh
    computes the operator replicated. Sequences are cut over dp and, in prefill, their tokens over
    cp, unless the operator's role says otherwise.
    """
    has = set(op.dims) | set(op.contract)
    wanted = [("dp", "B"), *([("cp", "T")] if phase == "prefill" else [])]
    wanted += roles[op.role]
    chosen: dict[str, str] = {}
    for group, dim in wanted:
        if dim in has and dim not in op.whole:
            chosen |= dict.fromkeys(mesh.groups[group], dim)
    return chosen


def carry(mesh: Mesh, par: Parallelism, phase: Phase) -> dict[str, str]:
    """Layout of the hidden state between layers."""
    chosen = dict.fromkeys(mesh.groups["dp"], "B")
    if phase == "prefill":
        chosen |= dict.fromkeys(mesh.groups["cp"], "T")
    if par.sp:
        chosen |= dict.fromkeys(mesh.groups["tp"], _TOKEN_DIM[phase])
    return chosen


def balanced_stages(spec: ModelSpec, par: Parallelism) -> tuple[int, ...]:
    """Layers of each stage: as given, else equal with the remainder on the middle stages.

    The first stage also holds the embedding and the last the LM head, so they take the
    remainder last.
    """
    if par.stage_layers:
        return par.stage_layers
    each, extra = divmod(spec.layers, par.pp)
    order = [*range(1, par.pp - 1), 0, par.pp - 1]
    longer = set(order[:extra]) if par.pp > 1 else set()
    return tuple(each + (stage in longer) for stage in range(par.pp))
