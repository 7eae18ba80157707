"""Runs the commands of README.md again: every plan, the ablation, and the validation.

    python results/regenerate.py            all of them
    python results/regenerate.py NAME...    those whose path below results/ holds a NAME
    python results/regenerate.py validation --accept    also where an error grew

The commands stand in README.md alone; this script reads them there. The ablation is one page of
two clusters, and the validation has a baseline, so these are made here. Results replace those that
are committed; the baseline of the validation is a ratchet, which only --accept lets go back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

from shardplan.costmodel.validation import baseline_of, tightened, worse
from shardplan.models.atomic import write_atomically
from shardplan.search.ablation import run_ablation
from shardplan.search.ablation_tables import to_markdown
from shardplan.search.main import run
from shardplan.search.validate import Report, validate
from shardplan.search.validate_out import PAGE_MARKS, between
from shardplan.search.validate_plot import scatter_svg
from shardplan.search.validate_tables import SHORT, short_table, summary_table
from shardplan.search.validate_tables import to_markdown as validation_page

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "results" / "README.md"
ABLATION = ROOT / "results" / "ablation" / "llama-65b.md"
ABLATION_CLUSTERS = ("atlas-800-9000", "atlas-800t-a2")
VALIDATION = ROOT / "results" / "validation" / "validation.md"
CHINESE = ("对象", "数据点", "未参与拟合", "MAPE", "p90", "拟合误差")
"""Headings of the short table in README.zh-CN.md."""
_PROGRAM = "shardplan "
_ACCEPT = "--accept"


def commands(folder: str = "") -> dict[str, list[str]]:
    """Arguments of each `shardplan` command of README.md, by what it writes below results/.

    `folder`: those alone that write into it.
    """
    lines = [line.strip() for line in README.read_text(encoding="utf-8").splitlines()]
    found = [shlex.split(line)[1:] for line in lines if line.startswith(_PROGRAM)]
    named = {
        Path(words[words.index("--out") + 1]).relative_to("results").as_posix(): words
        for words in found
    }
    return {path: words for path, words in named.items() if path.startswith(folder)}


def write_ablation(page: Path) -> None:
    """The page, and beside it the same numbers as JSON."""
    model = page.stem
    found = [run_ablation(model, cluster) for cluster in ABLATION_CLUSTERS]
    write_atomically(page, to_markdown(found))
    plain = json.dumps([one.to_json() for one in found], indent=2)
    write_atomically(page.with_suffix(".json"), plain + "\n")


def write_validation(page: Path, *, accept: bool = False) -> int:
    """The page, the picture and the baseline beside it; 1 where an error grew and is not accepted.

    The tables of other pages follow where the page is the committed one.
    """
    report = validate()
    kept = page.with_name("baseline.json")
    baseline = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    fallen = worse(baseline, report.groups)
    for line in fallen:
        sys.stderr.write(f"worse: {line}\n")
    if fallen and not accept:
        sys.stderr.write(f"error: {len(fallen)} errors grew; {_ACCEPT} takes them as they are\n")
        return 1
    new = baseline_of(report.groups) if accept else tightened(baseline, report.groups)
    write_atomically(kept, json.dumps(new, indent=1) + "\n")
    write_atomically(page, validation_page(report))
    write_atomically(page.with_name("scatter.svg"), scatter_svg(report.figures))
    if page == VALIDATION:
        for place, table in page_tables(report).items():
            text = place.read_text(encoding="utf-8")
            write_atomically(place, between(text, PAGE_MARKS, table))
    return 0


def page_tables(report: Report) -> dict[Path, str]:
    """Pages outside results/ that show errors, and the table of each."""
    return {
        ROOT / "docs" / "cost-model.md": summary_table(report),
        ROOT / "README.md": short_table(report, ("what", *SHORT)),
        ROOT / "README.zh-CN.md": short_table(report, CHINESE),
    }


def _quiet(words: list[str]) -> int:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return run(words)


def main(arguments: list[str]) -> int:
    """Exit code: that of the first command that fails, 2 where a name matches nothing."""
    os.chdir(ROOT)
    names = [word for word in arguments if word != _ACCEPT]
    known = commands()
    ablation, validation = (
        page.relative_to(ROOT / "results").as_posix() for page in (ABLATION, VALIDATION)
    )
    for name in names:
        if not any(name in path for path in (*known, ablation, validation)):
            there = ", ".join((*known, ablation, validation))
            sys.stderr.write(f"error: no result has {name!r}; try {there}\n")
            return 2
    for path, words in known.items():
        if not names or any(name in path for name in names):
            code = _quiet(words)
            if code:
                return code
            sys.stderr.write(f"wrote results/{path}\n")
    if not names or any(name in ablation for name in names):
        write_ablation(ABLATION)
        sys.stderr.write(f"wrote results/{ablation}\n")
    if not names or any(name in validation for name in names):
        code = write_validation(VALIDATION, accept=_ACCEPT in arguments)
        if code:
            return code
        sys.stderr.write(f"wrote results/{validation}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
