"""Files of a simulation: requests.csv, cache.csv, summary.json and, where asked, timeline.json.

The same plan, workload, seed and version give the same bytes. Requests stand in the order of their
ends, written as they end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardplan.costmodel.simulate.record import COLUMNS, row_of
from shardplan.costmodel.simulate.request import Request
from shardplan.costmodel.simulate.timeline import Timeline
from shardplan.models.atomic import write_atomically, written_atomically
from shardplan.search.cli_common import strict
from shardplan.search.rounding import rounded
from shardplan.search.simulate import Simulated

__all__ = ["requests_file", "write_simulation"]


@contextmanager
def requests_file(folder: Path | None) -> Iterator[Callable[[Request], None] | None]:
    """What writes a request into `folder`/requests.csv; None where there is no folder."""
    if folder is None:
        yield None
        return
    with written_atomically(folder / "requests.csv") as file:
        file.write(",".join(COLUMNS) + "\n")

        def write(request: Request) -> None:
            file.write(row_of(request))

        yield write


def write_simulation(
    folder: Path, found: Simulated, summary: dict[str, Any], timeline: Timeline | None
) -> None:
    """All that is known when the run has ended."""
    text = json.dumps(rounded(strict(summary)), indent=2, allow_nan=False)
    write_atomically(folder / "summary.json", text + "\n")
    cells = found.recorder.course.means()
    lines = [f"{begin:.10g},{share:.10g}\n" for begin, share in cells]
    write_atomically(folder / "cache.csv", "begin_s,share_in_use\n" + "".join(lines))
    if timeline is not None:
        with written_atomically(folder / "timeline.json") as file:
            for chunk in timeline.chunks():
                file.write(chunk)
