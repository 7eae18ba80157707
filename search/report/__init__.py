"""`report.html`: a plan as one page that needs nothing else, on a screen or on paper.

No script, no font, no picture from elsewhere: the style sheet stands in the page, charts are
inline SVG, and a Content-Security-Policy forbids the browser to fetch anything, so the page opens
offline and a hostile name in a plan stays text. The same plan and trials give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError
from shardplan.search.plan import Plan
from shardplan.search.predicted import known_steps
from shardplan.search.report.page import page
from shardplan.search.trial_table import TrialTable

if TYPE_CHECKING:
    from pandas import DataFrame

    from shardplan.search.oplevel.plan import OperatorPlan

__all__ = ["write_report"]


def write_report(
    plan: Plan | OperatorPlan, trials: TrialTable | DataFrame, path: Path, **files: str | None
) -> None:
    """Write the report of a plan and of the trials it was chosen from, whole or not at all.

    `files`: model, cluster and device as of `known_steps`, where the plan's own are no presets.

    `trials` has the columns of `shardplan.search.trials.TRIAL_COLUMNS`. At most about 2,000 of
    them are drawn, and the page says so. `InputError` where the file cannot be written, and for a
    plan of operators.
    """
    if not isinstance(plan, Plan):
        raise InputError(
            "a report tells the plan of a deployment",
            got=f"a plan of the operators of {plan.graph!r}",
            hint="`shardplan search` writes its report; `shardplan explain` tells such a plan",
        )
    write_atomically(path, page(plan, trials, known_steps(plan, **files)))
