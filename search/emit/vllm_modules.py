"""Modules split over data-parallel ranks, as the target `vllm-ascend` says them.

The plugin's `finegrained_tp_config` counts data-parallel ranks. It cuts the LM head and the dense
feed-forward layers over them, of models with experts and tp=1, within one server; the attention
output and the embedding only on the decode side of a disaggregated deployment. Every other module
split is refused (`search/data/vllm_ascend.toml` names where that was read).
"""

from __future__ import annotations

from shardplan.models.modules import MODULES, module_ranks
from shardplan.search.emit.common import table
from shardplan.search.emit.vllm_layout import has_experts
from shardplan.search.plan import Plan

__all__ = ["module_rules", "module_sizes"]

_ASKED = "module splits other than tp"


def module_sizes(plan: Plan) -> dict[str, int]:
    """Key of the plugin -> ranks, of every module that is not split as tp says."""
    par, names = plan.strategy.parallelism(), table("vllm_ascend")["module_ranks"]
    return {
        str(names.get(module, module)): module_ranks(par, module)
        for module in MODULES
        if module_ranks(par, module) != par.tp
    }


def module_rules(plan: Plan) -> list[tuple[bool, str, str, str]]:
    """(broken, rule, got, hint) of what the plugin cannot split."""
    par, names = plan.strategy.parallelism(), table("vllm_ascend")["module_ranks"]
    apart = [module for module in MODULES if module_ranks(par, module) != par.tp]
    got = ", ".join(f"{module}_tp={module_ranks(par, module)}" for module in apart)
    others = [module for module in apart if module not in names]
    hint = ", ".join(f"{module}_tp=0" for module in others or apart)
    groups = par.ep // par.tp
    return [
        (
            bool(others),
            "only the LM head and dense feed-forward layers have ranks of their own",
            got,
            f"search with {hint}",
        ),
        (
            bool(apart) and (par.tp > 1 or not has_experts(plan)),
            f"{_ASKED} are for models with experts and tp=1",
            f"{got}, tp={par.tp}",
            f"search with {hint}",
        ),
        (
            bool(apart) and any(groups % module_ranks(par, module) for module in apart),
            f"{_ASKED} divide the data-parallel ranks of one server, those that share experts",
            f"{got}, ep={par.ep}, dp={par.dp}",
            f"search with ep={par.tp * par.dp}, or with {hint}",
        ),
    ]
