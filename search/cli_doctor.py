"""`shardplan doctor`: whether the installation is whole, printed plainly: rich may be missing."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import typer

from shardplan.search.cli_common import WIDTH, Json, print_json

if TYPE_CHECKING:
    from shardplan.search.doctor import Check

__all__ = ["doctor"]

_STATE = max(map(len, ("ok", "absent", "warning", "broken")))


def doctor(json: Json = False) -> None:
    """Check this installation: what it needs, extras, other tools.

    Exits with 1 where something that is needed is broken.
    """
    from shardplan import __version__
    from shardplan.search.doctor import examine, is_whole

    checks = examine()
    whole = is_whole(checks)
    if json:
        told = [asdict(check) for check in checks]
        about = {"version": __version__, "python": platform.python_version()}
        print_json({**about, "platform": platform.platform(), "ok": whole, "checks": told})
    else:
        typer.echo(f"shardplan {__version__} on {platform.platform()}")
        for line in _lines(checks):
            typer.echo(line)
        typer.echo(f"\n{'all that is needed is there' if whole else 'something needed is broken'}")
    if not whole:
        raise typer.Exit(1)


def _lines(checks: Iterable[Check]) -> Iterator[str]:
    """A table of each part; what there is to say stands below a row where it is too long."""
    for part, group in groupby(checks, key=lambda check: check.part):
        rows = list(group)
        name_width = max(len(check.name) for check in rows)
        found_width = max(len(_found(check)) for check in rows)
        yield f"\n{part}"
        for check in rows:
            row = f"  {check.state:{_STATE}}  {check.name:{name_width}}  "
            row += f"{_found(check):{found_width}}"
            below = len(row) + 2 + len(check.says) > WIDTH
            yield (row if below else f"{row}  {check.says}").rstrip()
            if below:
                yield f"{' ' * (_STATE + 4)}{check.says}"


def _found(check: Check) -> str:
    return f"{check.found} ({check.needed})" if check.needed else check.found
