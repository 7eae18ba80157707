"""What an instance of a prefill or a decode pool does, in one finding.

It is priced as the search prices instances (`search.disagg_pools`): prefill at the prompts of one
step, decode at its slots, each as if the other pool kept up with it.
"""

from __future__ import annotations

import math

from shardplan.search.disagg_pools import columns_alone
from shardplan.search.disagg_space import Judged, Pool, Role
from shardplan.search.lint_case import Case
from shardplan.search.lint_report import Finding

__all__ = ["instance_finding"]


def instance_finding(case: Case, slots: int, chunk: int) -> Finding:
    """Of `slots` sequences, or steps of `chunk` tokens, of a dp group; a warning where a limit that
    was asked for is broken however few requests come."""
    role: Role = "prefill" if case.config.role == "prefill" else "decode"
    question, par = case.question, case.parallel
    pool = Pool(
        role=role,
        spec=question.spec,
        cluster=question.cluster,
        engine=question.engine,
        cards=par.ranks,
        choices=(case.choice,),
        grid=(chunk if role == "prefill" else slots,),
        workload=question.workload,
        sizes=(par.ranks,),
        reach=case.resolved.reach,
        layouts=(Judged(par),),
    )
    columns = columns_alone(pool, par, case.choice)
    found = {name: float(values.flat[0]) for name, values in columns.items()}
    work, limits = question.workload, question.limits
    lengths = f"{work.input_len:,} prompt and {work.output_len:,} output tokens"
    if role == "prefill":
        late = found["alone_s"] > (limits.ttft_s or math.inf)
        said = f"{found['rate']:.3g} prompts/s, one alone in {found['alone_s'] * 1e3:.4g} ms"
    else:
        late = found["tpot_s"] > (limits.tpot_s or math.inf)
        tokens = found["rate"] * work.output_len
        said = f"{found['rate']:.3g} requests/s, {tokens:,.0f} output tokens/s"
        if math.isfinite(found["tpot_s"]) and work.output_len > 1:
            said += f", TPOT {found['tpot_s'] * 1e3:.4g} ms with all {slots:,} slots of a group"
    return Finding(
        level="warning" if late else "note",
        rule="",
        sentence=f"what the {role} instance serves where the other pool keeps up",
        source="",
        got=f"{said} ({lengths})",
        hint="plan both pools: shardplan search --serving disagg",
    )
