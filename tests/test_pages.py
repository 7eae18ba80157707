"""What the pages take from the code is as the code has it; links between them lead somewhere."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from docs.coefficients import PAGE as COEFFICIENTS
from docs.coefficients import coefficients
from docs.outputs import FILLED, filled, lay_out
from docs.reference import PAGE as REFERENCE
from docs.reference import reference

ROOT = Path(__file__).resolve().parent.parent
PAGES = (*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md")))
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


WRITE = "run PYTHONPATH=src python -m docs"


@pytest.mark.parametrize(("page", "made"), [(REFERENCE, reference), (COEFFICIENTS, coefficients)])
def test_a_page_is_what_the_code_says(page: Path, made: Callable[[], str]) -> None:
    stale = page.read_text(encoding="utf-8") != made()
    assert not stale, WRITE


def test_every_word_is_used() -> None:
    """A column that is gone takes its text with it."""
    page = reference()
    words = tomllib.loads((ROOT / "docs" / "words.toml").read_text(encoding="utf-8"))
    unused = [
        f"{section}.{name}"
        for section, texts in words.items()
        for name, text in texts.items()
        if not re.search(rf"^\| `{name}` \|(.*\|)? {re.escape(text)} \|$", page, re.MULTILINE)
    ]
    assert unused == []


@pytest.mark.slow
@pytest.mark.parametrize("page", FILLED, ids=lambda page: page.name)
def test_outputs_are_what_the_commands_print(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lay_out(tmp_path)
    assert filled(text, tmp_path) == text, WRITE


def test_parts_of_an_output_are_found_by_how_their_lines_begin(tmp_path: Path) -> None:
    (tmp_path / "made.txt").write_text("head\none 1\ntwo 2\n\nthree 3\nfour 4\nlast\n")
    page = "<!-- shows of made.txt: one ... blank | three -->\n```text\nold\n```\n"
    shown = "one 1\ntwo 2\n...\nthree 3\n"
    assert filled(page, tmp_path) == page.replace("old\n", shown)
    with pytest.raises(ValueError, match="'five'"):
        filled(page.replace("three", "five"), tmp_path)


def _anchors(page: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        for heading in _HEADING.findall(text)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in _LINK.findall(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert [name for name in pages if f"]({name})" not in index] == []


_SPAN = re.compile(r"`([^`\n]+)`")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e\d+)?%?")


def _facts(page: Path) -> dict[str, list[str]]:
    """What a README says in every language alike: blocks, code, numbers, links."""
    text = page.read_text(encoding="utf-8")
    prose = _FENCED.sub("", text)
    plain = _LINK.sub("](link)", _SPAN.sub("code", prose))
    return {
        "blocks": _FENCED.findall(text),
        "code": sorted(_SPAN.findall(prose)),
        "numbers": sorted(_NUMBER.findall(plain)),
        "links": sorted(link for link in _LINK.findall(prose) if not link.startswith("README")),
    }


@pytest.mark.parametrize("what", ["blocks", "code", "numbers", "links"])
def test_both_readmes_say_the_same(what: str) -> None:
    english, chinese = (_facts(ROOT / name)[what] for name in ("README.md", "README.zh-CN.md"))
    assert [one for one in english if one not in chinese] == [], "README.zh-CN.md lacks it"
    assert [one for one in chinese if one not in english] == [], "README.md lacks it"
    assert english == chinese
