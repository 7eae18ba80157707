"""Runs the commands of README.md again: every plan, and the ablation.

    python results/regenerate.py            all of them
    python results/regenerate.py NAME...    those whose path below results/ holds a NAME

The commands stand in README.md alone; this script reads them there. The ablation is one page of
two clusters, so it is made here. Results replace those that are committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

from shardplan.search.ablation import run_ablation
from shardplan.search.ablation_tables import to_markdown
from shardplan.search.main import run
from shardplan.search.plan import write_atomically

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "results" / "README.md"
ABLATION = ROOT / "results" / "ablation" / "llama-65b.md"
ABLATION_CLUSTERS = ("atlas-800-9000", "atlas-800t-a2")
_PROGRAM = "shardplan "


def commands() -> dict[str, list[str]]:
    """Arguments of each `shardplan` command of README.md, by what it writes below results/."""
    lines = [line.strip() for line in README.read_text(encoding="utf-8").splitlines()]
    found = [shlex.split(line)[1:] for line in lines if line.startswith(_PROGRAM)]
    return {
        Path(words[words.index("--out") + 1]).relative_to("results").as_posix(): words
        for words in found
    }


def write_ablation(page: Path) -> None:
    """The page, and beside it the same numbers as JSON."""
    model = page.stem
    found = [run_ablation(model, cluster) for cluster in ABLATION_CLUSTERS]
    write_atomically(page, to_markdown(found))
    plain = json.dumps([one.to_json() for one in found], indent=2)
    write_atomically(page.with_suffix(".json"), plain + "\n")


def _quiet(words: list[str]) -> int:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return run(words)


def main(names: list[str]) -> int:
    """Exit code: that of the first command that fails, 2 where a name matches nothing."""
    os.chdir(ROOT)
    known = commands()
    page = ABLATION.relative_to(ROOT / "results").as_posix()
    for name in names:
        if not any(name in path for path in (*known, page)):
            sys.stderr.write(f"error: no result has {name!r}; try {', '.join((*known, page))}\n")
            return 2
    for path, words in known.items():
        if not names or any(name in path for name in names):
            code = _quiet(words)
            if code:
                return code
            sys.stderr.write(f"wrote results/{path}\n")
    if not names or any(name in page for name in names):
        write_ablation(ABLATION)
        sys.stderr.write(f"wrote results/{page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
