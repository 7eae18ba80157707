"""Rules on the two pools of a disaggregated deployment: what prefill may hand to decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from shardplan.search.rulebook import Subject, family_name

__all__ = ["PAIR_RULES"]


def _same_family(prefill: Subject, decode: Subject) -> bool:
    return family_name(prefill.cluster.device) == family_name(decode.cluster.device)


def _no_pp_and_cp(prefill: Subject, decode: Subject) -> bool:
    return not any(s.parallel.pp > 1 and s.parallel.cp > 1 for s in (prefill, decode))


PAIR_RULES: Mapping[str, Callable[[Subject, Subject], bool]] = MappingProxyType(
    {
        "pd-family": _same_family,
        "pd-310p": lambda _prefill, _decode: False,
        "pd-tp": lambda prefill, decode: prefill.parallel.tp % decode.parallel.tp == 0,
        "pd-decode-pp": lambda _, decode: decode.parallel.pp == 1,
        "pd-pp-cp": _no_pp_and_cp,
        "pd-decode-cp": lambda _, decode: decode.parallel.cp == 1,
        "pd-mtp": lambda prefill, decode: (prefill.parallel.mtp > 0) == (decode.parallel.mtp > 0),
    }
)
