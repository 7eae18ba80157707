"""report.html in a real browser: it draws, complains of nothing, and is read without a mouse."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.search.browser import Browser, chromium, open_browser
from tests.search.plan_factory import make_plan, make_trials
from tests.search.test_report import HOSTILE

from shardplan.search.plan import Plan
from shardplan.search.report import write_report
from shardplan.search.trials import read_trials

PLANS = Path(__file__).resolve().parent.parent.parent / "results" / "plans"
NAMES = ("llama-65b_atlas-800t-a2", "deepseek-v3_cloudmatrix-384_disagg")
PROGRAM = chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium on the path"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all pages."""
    assert PROGRAM is not None
    with open_browser(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@functools.cache
def _plan(name: str) -> Plan:
    return Plan.load(PLANS / name / "plan.json")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of the committed plans, of the toy plan and of one with hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    made = {name: folder / f"{name}.html" for name in (*NAMES, "toy", "hostile")}
    for name in NAMES:
        write_report(_plan(name), read_trials(PLANS / name / "trials.csv"), made[name])
    write_report(make_plan(), make_trials(300), made["toy"])
    toy = make_plan()
    names = dict.fromkeys(("name", "architecture", "source"), HOSTILE)
    hostile = make_plan(model=toy.model.model_copy(update=names), notes=(HOSTILE,))
    write_report(hostile, make_trials(300), made["hostile"])
    return made


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", [*NAMES, "toy", "hostile"])
def test_a_page_draws_and_complains_of_nothing(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    """No error, nothing fetched, nothing wider than the screen, no script that a name brought."""
    browser.open(pages[name], width=width, dark=dark)
    assert browser.complaints() == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('script, img, iframe').length") == 0
    boxes = browser.run(
        "[...document.querySelectorAll('section')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(boxes) > 10
    assert min(boxes) > 40
    paint = browser.run("getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", paint)[0])
    assert (red < 64) == dark


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shown_are_the_numbers_of_the_plan(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    """The tiles, read off the page, against plan.json to the digits that they show."""
    browser.open(pages[name])
    tiles = browser.run(
        "Object.fromEntries([...document.querySelectorAll('.tiles > div')].map("
        "d => [d.querySelector('dt').innerText, d.querySelector('.big').innerText]))"
    )
    does = _plan(name).performance
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "": 1.0}
    for title, expected in {
        "Output tokens/s": does.output_tokens_per_s,
        "Tokens/s per card": does.output_tokens_per_s_per_card,
        "Time to first token": does.ttft_s,
        "Time per output token": does.tpot_s,
        "End to end": does.end_to_end_s,
        "Requests/s": does.requests_per_s,
    }.items():
        number, _, unit = tiles[title].partition(" ")
        shown = float(number.replace(",", "")) * units[unit]
        assert shown == pytest.approx(expected, rel=5e-3), title
    badge = browser.run("document.querySelector('.badges').innerText")
    assert "proven best in its space" in badge


@pytest.mark.parametrize("name", NAMES)
def test_a_screen_reader_finds_its_way(browser: Browser, pages: dict[str, Path], name: str) -> None:
    """Landmarks, one main heading, headed tables, and a name for every picture."""
    browser.open(pages[name])
    tree = browser.tree()
    roles = [one["role"] for one in tree]
    assert roles.count("main") == roles.count("banner") == roles.count("navigation") == 1
    assert browser.run("document.querySelectorAll('h1').length") == 1
    assert browser.run("document.documentElement.lang") == "en"
    assert browser.run("document.title").startswith(_plan(name).model.name)
    unnamed = [one["role"] for one in tree if one["role"] in ("image", "img") and not one["name"]]
    assert unnamed == []
    bare = browser.run(
        "[...document.querySelectorAll('table')].filter(t => !t.caption || "
        "t.querySelectorAll('thead th[scope=col]').length < 2 || "
        "[...t.querySelectorAll('tbody tr')].some(r => !r.querySelector('th[scope=row]'))).length"
    )
    assert bare == 0
    dead = browser.run(
        "[...document.querySelectorAll('nav a')].filter("
        "a => !document.querySelector(a.getAttribute('href'))).length"
    )
    assert dead == 0


def test_the_keyboard_reaches_the_front_and_reads_it(
    browser: Browser, pages: dict[str, Path]
) -> None:
    """Tab goes to the skip link first; a dot with the focus, and only that, is read out."""
    browser.open(pages[NAMES[0]])
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    seen = []
    for _ in range(120):
        browser.press("Tab")
        if browser.run("document.activeElement.getAttribute('class')") == "spot":
            seen.append(browser.run("document.activeElement.getAttribute('aria-label')"))
            shown = browser.run(
                "[...document.querySelectorAll('.readout')].filter("
                "r => getComputedStyle(r).display != 'none').map(r => r.textContent)"
            )
            assert len(shown) == 1
            assert seen[-1].split(":")[0] in shown[0]
        elif seen:
            break
    assert len(seen) >= 10
    assert seen[-1].startswith("This plan: ")


def test_a_dot_is_read_out_where_it_is_pointed_at(browser: Browser, pages: dict[str, Path]) -> None:
    """And the plan's own lines make room."""
    browser.open(pages[NAMES[0]])
    spot = browser.run(
        "(() => { const m = document.querySelector('.spot'); m.scrollIntoView({block: 'center'});"
        " const b = m.querySelector('circle').getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + b.height / 2, m.getAttribute('aria-label')] })()"
    )
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=spot[0], y=spot[1])
    shown = browser.run(
        "[...document.querySelectorAll('.readout')].filter("
        "r => getComputedStyle(r).display != 'none').map(r => r.textContent)"
    )
    assert len(shown) == 1
    assert spot[2].split(":")[0] in shown[0]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_stand_out_from_their_ground(
    browser: Browser, pages: dict[str, Path], dark: bool
) -> None:
    """Contrast of at least 4.5 to 1, as WCAG 2 asks of text (success criterion 1.4.3)."""
    browser.open(pages[NAMES[0]], dark=dark)
    pairs = browser.run(
        "['body', '.soft', 'section p', 'thead th', 'a', '.badge.good', 'summary', 'tr.own th']"
        ".map(s => { let e = document.querySelector(s); const ink = getComputedStyle(e).color;"
        " let g = 'rgba(0, 0, 0, 0)'; while (e && g == 'rgba(0, 0, 0, 0)') {"
        " g = getComputedStyle(e).backgroundColor; e = e.parentElement } return [s, ink, g] })"
    )
    for selector, ink, ground in pairs:
        light, deep = sorted((_luminance(ink), _luminance(ground)), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 4.5, selector


def _luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", NAMES)
def test_it_prints(browser: Browser, pages: dict[str, Path], name: str) -> None:
    """On A4 with its margins (182 mm wide) nothing is cut off; links for a screen are left out.

    Dark screens print on white paper.
    """
    browser.open(pages[name], width=688, dark=True)
    browser.ask("Emulation.setEmulatedMedia", media="print")
    assert browser.run("document.documentElement.scrollWidth") <= 688
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(browser.ask("Page.printToPDF")["data"]) > 50_000
