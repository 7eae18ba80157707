"""Algorithms that HCCL lets a user pick between servers (HCCL_ALGO level1): steps and volume.

p parties that meet in the tier, n message bytes, a the time of a step, b seconds a byte:

    algorithm   all_gather, reduce_scatter                    all_reduce
    ring        (p-1) a + (p-1)/p n b                         twice
    H-D_R       log2 p a + (p-1)/p n b           p = 2^k      twice
                (k + 1) a + ((q-1)/q + 1) n b    q = 2^k < p  (2k + 2) a + (2 (q-1)/q + 2) n b
    NHR, NB     ceil(log2 p) a + (p-1)/p n b                  twice
    pipeline    max(inter, intra) (p-1) + intra               twice
    pairwise    (all_to_all alone) (p-1) a + (p-1)/p n/p b

inter = a + s b of one step between servers, intra = a + s b of one step inside them, both for the
s = n / (all ranks) bytes of one rank: the ring between servers runs beside the exchange inside.
k = floor(log2 p). Where p is no power of two HCCL gives H-D_R's all_reduce alone; the halves are
taken as equal. A kind that an algorithm does not run is left to the library (`auto`), as HCCL does;
send and receive have no algorithm.
Source: HCCL user guide, "collective communication algorithms" and HCCL_ALGO
(mirror-cann/hccl@e1a8dc9b docs/zh/user_guide/coll_algo_intro, hccl_env/HCCL_ALGO.md,
hccl_env/inter_server_algo_support.md).

Left out: NHR_V1 and AHC, for which the guide gives no such form (of NHR_V1 it says "root
complexity" and slower than NHR; of AHC one all_reduce of two asymmetric groups); congestion, which
is what the guide recommends a ring for; messages so small that HCCL ignores the setting.
"""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["ALGORITHMS", "AUTO", "PIPELINE", "form", "runs"]

AUTO = "auto"
PIPELINE = "pipeline"
Algorithm = Literal["auto", "ring", "H-D_R", "NHR", "NB", "pipeline", "pairwise"]
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "H-D_R", "NHR", "NB", "pipeline", "pairwise")
"""Those with a documented form, as HCCL_ALGO spells them."""
_REDUCING = ("all_reduce", "all_gather", "reduce_scatter")


def runs(algorithm: str, kind: str) -> bool:
    """Whether a collective of this kind takes the algorithm; else it is left to the library."""
    if algorithm == AUTO:
        return False
    return kind == "all_to_all" if algorithm == "pairwise" else kind in _REDUCING


def form(algorithm: str, kind: str, parties: int) -> tuple[int, float]:
    """(steps, bytes over the rate as a share of the message) of one algorithm on one tier."""
    if algorithm == "pairwise":
        return parties - 1, (parties - 1.0) / parties / parties
    power = parties.bit_length() - 1
    whole = 2**power
    steps, share = math.ceil(math.log2(parties)), (parties - 1.0) / parties
    if algorithm in ("ring", PIPELINE):
        steps = parties - 1
    elif algorithm == "H-D_R" and whole != parties:
        steps, share = power + 1, (whole - 1.0) / whole + 1.0
    return (2 * steps, 2.0 * share) if kind == "all_reduce" else (steps, share)
