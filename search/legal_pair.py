"""Rules on the two pools of a disaggregated deployment: what prefill may hand to decode.

They look at tp, pp, cp and mtp of the two layouts alone, and at what is common to a pool: the
search groups layouts by these. Pools of two hardware generations are searched whatever the engine;
who writes an engine's files refuses those that its connector does not join.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from shardplan.search.rulebook import Subject

__all__ = ["PAIR_RULES"]


def _no_pp_and_cp(prefill: Subject, decode: Subject) -> bool:
    return not any(s.parallel.pp > 1 and s.parallel.cp > 1 for s in (prefill, decode))


PAIR_RULES: Mapping[str, Callable[[Subject, Subject], bool]] = MappingProxyType(
    {
        "pd-310p": lambda _prefill, _decode: False,
        "pd-tp": lambda prefill, decode: prefill.parallel.tp % decode.parallel.tp == 0,
        "pd-decode-pp": lambda _, decode: decode.parallel.pp == 1,
        "pd-pp-cp": _no_pp_and_cp,
        "pd-decode-cp": lambda _, decode: decode.parallel.cp == 1,
        "pd-mtp": lambda prefill, decode: (prefill.parallel.mtp > 0) == (decode.parallel.mtp > 0),
    }
)
