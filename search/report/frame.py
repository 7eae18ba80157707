"""What every report page has: its head, contents, tiles, pairs, the proof, the notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources

from shardplan.search.plan import ProofInfo
from shardplan.search.report.markup import Html, raw, tag

__all__ = [
    "Section",
    "commands",
    "document",
    "notes_section",
    "page_header",
    "pairs",
    "proof_badge",
    "proof_section",
    "tiles",
]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_MOST_CHECKS = 8
Section = tuple[str, str, Html]
"""(id, short title, section); an empty section is left out."""


def document(title: str, header: Html, found: Iterable[Section]) -> str:
    """The whole HTML document, its sections with links to them."""
    style = resources.files("shardplan.search.report").joinpath("assets", "report.css")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", raw(style.read_text(encoding="utf-8"))),
    )
    sections = [(name, title, section) for name, title, section in found if section]
    parts = [tag("div", section, id=name, class_="part") for name, _, section in sections]
    skip = tag("a", "Skip to the plan", href="#summary", class_="skip")
    body = tag("body", skip, header, _contents(sections), tag("main", *parts))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _contents(sections: Sequence[Section]) -> Html:
    """Links to the sections."""
    items = [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in sections]
    return tag("nav", tag("ul", *items), aria_label="Contents")


def tiles(found: Iterable[tuple[str, str, str]]) -> Html:
    """Boxes of (name, value, note)."""
    boxes = [
        tag(
            "div",
            tag("dt", name),
            tag("dd", value, class_="big"),
            tag("dd", note, class_="soft"),
        )
        for name, value, note in found
    ]
    return tag("dl", *boxes, class_="tiles")


def pairs(found: Iterable[tuple[str, str]]) -> Html:
    """Short (name, value) lines."""
    cells = [cell for name, value in found for cell in (tag("dt", name), tag("dd", value))]
    return tag("dl", *cells, class_="pairs")


def commands(found: Iterable[tuple[str, str]]) -> Html:
    """(what for, command) lines."""
    cells = [
        cell
        for what, command in found
        for cell in (tag("dt", what), tag("dd", tag("code", command)))
    ]
    return tag("dl", *cells, class_="commands")


def page_header(kind: str, what: str, machine: str, badges: Iterable[Html]) -> Html:
    """The head of the page: what on which machine, and what makes the plan worth trusting."""
    return tag(
        "header",
        tag("p", kind, class_="kicker"),
        tag("h1", what, tag("span", " on ", class_="soft"), machine),
        tag("p", *badges, class_="badges"),
    )


def proof_badge(proof: ProofInfo) -> Html:
    """Whether the plan was proven, for the head of the page."""
    if proof.passed:
        return tag("span", f"proof level {proof.level} passed", class_="badge good")
    return tag("span", "proof failed", class_="badge bad")


def proof_section(proof: ProofInfo, level: str) -> Html:
    """What failed in the open; what passed too, unless it is a long list. `level`: in words."""
    failed = [_check("\N{MULTIPLICATION X}", "bad", text) for text in proof.failures]
    passed = [_check("\N{CHECK MARK}", "good", text) for text in proof.checks]
    verdict = "Passed." if proof.passed else "Failed: do not deploy this plan."
    checks = tag("ul", *passed, class_="checks")
    if len(passed) > _MOST_CHECKS:
        checks = tag("details", tag("summary", f"The {len(passed)} checks that passed"), checks)
    return tag(
        "section",
        tag("h2", "What was proven"),
        tag("p", f"{level} {verdict}"),
        tag("ul", *failed, class_="checks") if failed else "",
        checks if passed else "",
    )


def _check(mark: str, style: str, text: str) -> Html:
    return tag("li", tag("span", mark, class_=f"mark {style}", aria_hidden="true"), text)


def notes_section(notes: Sequence[str]) -> Html:
    """What the search has to say beside the plan; nothing where that is nothing."""
    if not notes:
        return Html("")
    items = [tag("li", note) for note in notes]
    return tag("section", tag("h2", "Notes"), tag("ul", *items, class_="notes"))
