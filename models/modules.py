"""Modules that are split over other ranks than tp, and how all widths nest in one mesh.

A module is the attention output (`o`), the dense feed-forward network (`ffn`), the shared experts
(`shared`), the LM head (`head`) or the embedding table (`embed`). `Parallelism.<module>_tp` says
over how many ranks w its weights are cut:

    0         the tp ranks, like everything else
    1         none: whole on every rank, which takes the tokens that it holds between products
    tp * m    the tp ranks of m neighbouring data-parallel groups: their tokens are gathered before
              the module and dealt out again after it (the attention output exchanges heads for
              tokens instead)

Data-parallel groups that share experts are neighbours, too, so dp is factored by all widths m,
which therefore divide one another: dp = dp0 dp1 ... with the narrowest group last.

Experts over more ranks than tp take context-parallel ranks first, then data-parallel groups:
ep = tp c d with d = 1 or c = cp.
Left out: modules over a part of tp (they would hold more and sum over fewer ranks).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from shardplan.models.errors import LayoutError
from shardplan.models.spec import ModelSpec

if TYPE_CHECKING:
    from shardplan.models.parallel import Parallelism

__all__ = [
    "MODULES",
    "check_expert_groups",
    "check_modules",
    "data_widths",
    "expert_groups",
    "groups_of",
    "module_is_whole",
    "module_ranks",
    "o_dim",
]

MODULES = ("o", "ffn", "shared", "head", "embed")
"""Modules that may be split over other ranks than tp (`Parallelism.o_tp`, ...)."""


def module_ranks(par: Parallelism, module: str) -> int:
    """Ranks that the weights of a module are cut over."""
    asked: int = getattr(par, f"{module}_tp")
    return asked or par.tp


def module_is_whole(par: Parallelism, module: str) -> bool:
    """Whether every rank of a tp group holds the module whole."""
    return module_ranks(par, module) < par.tp


def groups_of(par: Parallelism, module: str) -> int:
    """Data-parallel groups that share a module's weights."""
    return max(module_ranks(par, module) // par.tp, 1)


def expert_groups(par: Parallelism) -> tuple[int, int]:
    """(context-parallel ranks, data-parallel groups) that share experts beyond one tp group."""
    beyond = max(par.ep // par.tp, 1)
    within = min(beyond, par.cp)
    return within, beyond // within


def data_widths(par: Parallelism) -> tuple[int, ...]:
    """Numbers of neighbouring data-parallel groups that share something, the narrowest first."""
    widths = {expert_groups(par)[1], *(groups_of(par, module) for module in MODULES)}
    return tuple(sorted(widths - {1}))


def o_dim(spec: ModelSpec, par: Parallelism) -> str:
    """The dim of attention heads that m data-parallel groups cut the output projection along.

    Heads where tp leaves them whole, else the width of a head: what a rank exchanges is the same.
    """
    return "K" if par.tp == 1 and spec.kv_heads % groups_of(par, "o") == 0 else "D"


def _sizes(spec: ModelSpec, par: Parallelism) -> dict[str, tuple[str, int, int]]:
    """Module -> (what is cut, its size, ways it is cut), of the modules that the model has."""
    found = {
        "embed": ("vocab_size", spec.vocab, module_ranks(par, "embed")),
        "head": ("vocab_size", spec.vocab, module_ranks(par, "head")),
    }
    if o_dim(spec, par) == "K":
        found["o"] = ("kv heads", spec.kv_heads, groups_of(par, "o"))
    else:
        width = spec.mla.v_head_dim if spec.mla is not None else spec.head_dim
        found["o"] = ("head_dim", width, groups_of(par, "o"))
    if spec.dense_layers:
        found["ffn"] = ("intermediate_size", spec.ffn, module_ranks(par, "ffn"))
    if spec.moe is not None and spec.moe.shared_ffn:
        width = spec.moe.shared_ffn
        found["shared"] = ("the shared experts' width", width, module_ranks(par, "shared"))
    return found


def _check_ranks(par: Parallelism, module: str) -> None:
    name, asked = f"{module}_tp", getattr(par, f"{module}_tp")
    if asked < 0 or (
        asked not in (0, 1, par.tp) and (asked % par.tp or par.dp % max(asked // par.tp, 1))
    ):
        raise LayoutError(
            f"{name} is 0 (as tp), 1 (whole on every rank) or tp times a divisor of dp",
            got=f"{name}={asked}, tp={par.tp}, dp={par.dp}",
            hint=f"try 0, 1 or {par.tp * par.dp}",
        )
    if groups_of(par, module) > 1 and par.cp > 1:
        raise LayoutError(
            "a module over several data-parallel groups needs contexts that are not split",
            got=f"{name}={asked}, tp={par.tp}, cp={par.cp}",
            hint=f"use cp=1 or {name}=0",
        )


def _check_nesting(par: Parallelism) -> None:
    chain = (*data_widths(par), par.dp)
    if any(large % small for small, large in itertools.pairwise(chain)):
        sizes = [f"{m}_tp={getattr(par, f'{m}_tp')}" for m in MODULES if getattr(par, f"{m}_tp")]
        raise LayoutError(
            "data-parallel groups that share modules or experts nest: each number of them "
            "divides the next larger one",
            got=f"groups that share: {', '.join(map(str, chain[:-1]))}; dp={par.dp}, "
            f"tp={par.tp}, ep={par.ep}, {', '.join(sizes)}",
            hint="use the same number for both, or one that divides the other",
        )


def check_modules(spec: ModelSpec, par: Parallelism) -> None:
    """`LayoutError` unless every module can be cut as asked and the cuts nest."""
    asked = [module for module in MODULES if getattr(par, f"{module}_tp")]
    if not asked:
        return
    for module in asked:
        _check_ranks(par, module)
    sizes = _sizes(spec, par)
    for module in asked:
        name, value = f"{module}_tp", getattr(par, f"{module}_tp")
        if module not in sizes:
            raise LayoutError(
                f"{name} needs a model that has such a module",
                got=f"{name}={value}, model={spec.name}",
                hint=f"use {name}=0",
            )
        what, size, ways = sizes[module]
        if size % ways:
            raise LayoutError(
                f"{name} must divide {what}" + (" by its groups" if module == "o" else ""),
                got=f"{name}={value}, tp={par.tp}, {what}={size}",
                hint=f"use {name}=0",
            )
    if spec.tied_embeddings and module_ranks(par, "head") != module_ranks(par, "embed"):
        raise LayoutError(
            "the LM head and the embedding share one table, so they are split alike",
            got=f"head_tp={par.head_tp}, embed_tp={par.embed_tp}, tp={par.tp}",
            hint="use the same number for both",
        )
    _check_nesting(par)


def check_expert_groups(par: Parallelism) -> None:
    """`LayoutError` unless experts beyond tp take whole contexts' ranks, then whole dp groups."""
    beyond = par.ep // par.tp
    if par.cp == 1:
        if par.ep % par.tp or par.dp % beyond:
            raise LayoutError(
                "ep above tp takes whole tp groups of a stage: tp divides ep and ep divides tp*dp",
                got=f"ep={par.ep}, tp={par.tp}, dp={par.dp}",
                hint=f"try ep={par.tp} or ep={par.tp * par.dp}",
            )
    elif par.ep % par.tp or (
        par.cp % beyond if beyond <= par.cp else beyond % par.cp or par.dp % (beyond // par.cp)
    ):
        raise LayoutError(
            "ep above tp is tp times a divisor of cp, or tp*cp times a divisor of dp",
            got=f"ep={par.ep}, tp={par.tp}, cp={par.cp}, dp={par.dp}",
            hint=f"try ep={par.tp}, ep={par.tp * par.cp} or ep={par.tp * par.cp * par.dp}",
        )
    elif par.sp and par.exchange == "alltoall":
        raise LayoutError(
            "tokens split over tp (sp) are not also split over cp to be sent to experts",
            got=f"ep={par.ep}, tp={par.tp}, cp={par.cp}, sp, exchange=alltoall",
            hint="gather them (exchange allgather), leave sp off, or use an ep of at most tp",
        )
