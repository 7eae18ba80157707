"""Outputs that a page shows, filled in by running its commands.

Before a block of text a comment says what of the output of the commands since the last such comment
is shown: lines that begin with a word, or from one such line to another (`blank`: to the end of the
paragraph), with "..." between parts that are apart; after `of NAME`, of a file that they wrote.

    <!-- shows: plan: | performance ... one request -->
    <!-- shows of deploy/serve_node0.sh: exec ... --dtype | --compilation -->

Commands run in one folder, in the order of the page. A word that no line begins with is an error:
the page then speaks of what is no longer there.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

from shardplan.search.main import run

__all__ = ["FILLED", "filled", "lay_out"]

_PAGES = Path(__file__).resolve().parent
_ROOT = _PAGES.parent
FILLED = (_PAGES / "calibrate.md", _PAGES / "tutorial.md")
"""Pages with outputs."""
_MEASURED = """model,cluster,tp,phase,batch,tokens,measured_s
llama-3.1-8b,atlas-800t-a2,4,decode,16,1024,0.009
llama-3.1-8b,atlas-800t-a2,4,prefill,1,2048,0.12
"""
_TABLES = {
    "in.csv": """model,cluster,tp,phase,batch,tokens
llama-3.1-8b,atlas-800t-a2,4,decode,16,1024
llama-3.1-8b,atlas-800t-a2,3,decode,16,1024
""",
    "mine.csv": _MEASURED,
    "my.csv": _MEASURED,
}
_PART = re.compile(
    r"^```sh\n(?P<shell>.*?)^```$"
    r"|^<!-- shows(?: of (?P<file>\S+?))?: (?P<parts>.*?) -->\n```text\n(?P<shown>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def filled(text: str, folder: Path) -> str:
    """The page with its outputs anew; commands run in `folder`, as `lay_out` left it. `ValueError`
    where one fails."""
    output = ""

    def replace(found: re.Match[str]) -> str:
        nonlocal output
        if found["shell"] is not None:
            output = "".join(_run(line) for line in _commands(found["shell"]))
            return found[0]
        shown = output if found["file"] is None else Path(found["file"]).read_text("utf-8")
        lines = _chosen(shown.splitlines(), found["parts"])
        before = found[0][: found.start("shown") - found.start()]
        return before + "\n".join(lines) + "\n```"

    with contextlib.chdir(folder):
        return _PART.sub(replace, text)


def lay_out(folder: Path) -> None:
    """Put what pages take from their reader and from a clone into the folder of their commands."""
    shutil.copytree(_ROOT / "results" / "profiles", folder / "results" / "profiles")
    samples = _ROOT / "tests" / "costmodel" / "profiler_samples"
    shutil.copy(samples / "kernel_details.csv", folder)
    for name, text in _TABLES.items():
        (folder / name).write_text(text, encoding="utf-8")


def _commands(shell: str) -> list[str]:
    """Commands of ours in a shell block; other lines are for the reader to run."""
    lines = shell.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("shardplan ")]


def _run(line: str) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(shlex.split(line)[1:])
    if code:
        raise ValueError(f"{line}: ends with {code}: {err.getvalue()}")
    return out.getvalue()


def _chosen(lines: list[str], parts: str) -> list[str]:
    """Lines of an output that the parts name, in their order."""
    shown: list[str] = []
    last = -1
    for part in parts.split(" | "):
        first, _, end = (word.strip() for word in part.partition(" ... "))
        start = _place(lines, first, last + 1)
        if end == "blank":
            stop = (
                next((n for n in range(start, len(lines)) if not lines[n].strip()), len(lines)) - 1
            )
        else:
            stop = _place(lines, end, start) if end else start
        if shown and start > last + 1:
            shown.append("...")
        shown += [line.rstrip() for line in lines[start : stop + 1]]
        last = stop
    return shown


def _place(lines: list[str], word: str, start: int) -> int:
    for place in range(start, len(lines)):
        if lines[place].lstrip().startswith(word):
            return place
    raise ValueError(f"no line of the output begins with {word!r}")
