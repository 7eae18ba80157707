"""docs/reference.md, made from the code; `python -m docs` writes it.

What the page says of an option, a field or a key is what the code says: the help of the option, the
text under the attribute, the range of the key. Columns and keys without a text of their own have
one in docs/words.toml. tests/test_pages.py fails while the page is not what this writes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from docs.python_names import python_section

from shardplan.costmodel.catalog import CLUSTER_FIELDS, TIER_FIELDS, TIER_RANKS, cluster_names
from shardplan.costmodel.datafile import Field
from shardplan.costmodel.devices import DEVICE_FIELDS, device_names
from shardplan.costmodel.engines import ENGINE_FIELDS, EngineProfile, engine_names
from shardplan.costmodel.hardware import Cluster, Device, Tier, Topology
from shardplan.costmodel.simulate.record import COLUMNS as REQUEST_COLUMNS
from shardplan.models.catalog import model_names
from shardplan.models.errors import ShardplanError
from shardplan.search.cli_estimate import estimate
from shardplan.search.estimate import OUTPUT_COLUMNS
from shardplan.search.estimate_points import INPUT_COLUMNS
from shardplan.search.main import app_of
from shardplan.search.oplevel.plan import operator_plan_schema
from shardplan.search.plan import Plan, plan_schema
from shardplan.search.profiling.table import COLUMNS as PROFILE_COLUMNS
from shardplan.search.rulebook import rules
from shardplan.search.simulate_demand import KEYS
from shardplan.search.trials import INTEGER_COLUMNS, SWITCH_COLUMNS, TRIAL_COLUMNS, WORD_COLUMNS
from shardplan.search.validate import METRICS

__all__ = ["PAGE", "markdown_table", "reference"]

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "reference.md"
_UNIT = re.compile(r", (seconds|bytes)\.$")
"""Of the attribute; a key has its own."""
_KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false"}
_HEAD = """# Reference

Written by `python -m docs` from the code; not by hand.

[Commands](#commands) ·
[Exit codes](#exit-codes) ·
[Python](#python) ·
[plan.json](#planjson) ·
[CSV files](#csv-files) ·
[TOML files](#toml-files) ·
[Legality rules](#legality-rules) ·
[What ships](#what-ships)
"""


def reference() -> str:
    """The whole page, as `PAGE` must be."""
    calls = (_HEAD, _commands(), _exit_codes(), python_section())
    files = (_plan(), _tables(), _files())
    return "\n".join((*calls, *files, _rules(), _shipped()))


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table; what a cell holds stays on one line."""
    names = list(head)
    lines = [names, ["---"] * len(names), *([_cell(one) for one in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _first(text: str | None) -> str:
    """The first paragraph, with code in single backticks."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    return paragraph.replace("``", "`")


def _attributes(owner: type) -> dict[str, str]:
    """The texts under the attributes of a class, of its bases too."""
    found: dict[str, str] = {}
    for one in reversed(owner.__mro__):
        if not one.__module__.startswith("shardplan."):
            continue
        body = ast.parse(inspect.getsource(one)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = _first(str(text.value.value))
    return found


@functools.cache
def _words() -> dict[str, dict[str, str]]:
    return tomllib.loads((FOLDER / "words.toml").read_text(encoding="utf-8"))


def _what(name: str, section: str, *texts: Mapping[str, str]) -> str:
    """What a name means: in the code, in its section of words.toml, or anywhere."""
    words = _words()
    places = (*texts, words.get(section, {}), words["common"])
    return next((place[name] for place in places if place.get(name)), "")


# Commands


def _commands() -> str:
    lines = ["## Commands\n"]
    for info in app_of().registered_commands:
        command = info.callback
        assert command is not None
        name = command.__name__
        lines.append(f"### shardplan {name}\n\n{inspect.getdoc(command)}\n")
        lines.append(markdown_table(("option", "default", "what"), _options(command)))
    return "\n".join(lines)


def _options(command: Any) -> Iterator[tuple[str, str, str]]:
    """Rows of a command's table: its options as they are typed, their defaults and help."""
    for name, told in _told(command).items():
        flags = [one for one in (told.default, *(told.param_decls or ())) if _is_flag(one)]
        shown = ", ".join(f"`{one}`" for one in flags) or f"`{(told.metavar or name).upper()}`"
        if told.metavar and flags:
            shown += f" {told.metavar}"
        default = inspect.signature(command).parameters[name].default
        yield shown, _option_default(default), told.help or ""


def _told(command: Any) -> dict[str, Any]:
    """What typer is told of each parameter of a command."""
    hints = typing.get_type_hints(command, include_extras=True)
    return {name: typing.get_args(hints[name])[1] for name in inspect.signature(command).parameters}


def _option_default(value: object) -> str:
    if value is inspect.Parameter.empty:
        return "must be given"
    if isinstance(value, bool):
        return "on" if value else "off"
    return _default(value)


def _is_flag(word: object) -> bool:
    """Whether typer was given a name: of an annotated option it keeps the first as its default."""
    return isinstance(word, str) and word.startswith("-")


def _exit_codes() -> str:
    rows = [("0", "-", "done")]
    found = sorted(_below(ShardplanError), key=lambda kind: (kind.exit_code, kind.code))
    rows += [(str(one.exit_code), f"`{one.code}`", _first(one.__doc__)) for one in found]
    rows += [
        ("2", "`usage`", "The command line itself is wrong."),
        ("1", "`bug`", "A bug of shardplan; SHARDPLAN_DEBUG=1 shows the whole traceback."),
        ("130", "-", "Interrupted."),
    ]
    rows.sort(key=lambda row: int(row[0]))
    text = (
        "## Exit codes\n\nAn error is one line on stderr, `error: rule (values); what to try`. "
        'With `--json` the same stands on stdout: `{"error": {code, rule, got, hint, message}}`.'
        "\n\n"
    )
    return text + markdown_table(("exit", "code", "when"), rows)


def _below(kind: type[ShardplanError]) -> list[type[ShardplanError]]:
    return [one for each in kind.__subclasses__() for one in (each, *_below(each))]


# plan.json


def _plan() -> str:
    deployment, shown = _records(plan_schema(), "Plan", "plan", ())
    operators, _ = _records(operator_plan_schema(), "OperatorPlan", "operators", shown)
    return "\n".join(
        (
            "## plan.json\n",
            "JSON Schema: `search/data/plan.schema.json`. Times are seconds, sizes bytes. The same "
            "question, seed and version give the same bytes. Read and write it with "
            "`shardplan.Plan.load` and `.save`.\n",
            deployment,
            "## plan.json of operators\n",
            "Of graphs that are split operator by operator ([operators.md](operators.md)). JSON "
            "Schema: `search/data/operators.schema.json`.\n",
            operators,
        )
    )


def _records(
    schema: Mapping[str, Any], root: str, section: str, shown: Iterable[str]
) -> tuple[str, tuple[str, ...]]:
    """A table a record of a schema, the root first; and the records that are then on the page."""
    bodies = {**schema["$defs"], root: schema}
    known = {one.__name__: one for one in _parts()}
    order = [*shown, root]
    first = len(order) - 1
    for name in order:  # grows: what a record names comes after it
        for each in re.findall(r"#/\$defs/(\w+)", str(bodies.get(name, {}).get("properties"))):
            if each not in order:
                order.append(each)
    lines = []
    for name in order[first:]:
        told = _attributes(known[name])
        rows = [
            (f"`{field}`", _type(one), _what(field, section, told))
            for field, one in bodies[name]["properties"].items()
        ]
        lines.append(f"### {name}\n\n{_first(known[name].__doc__)}\n")
        lines.append(markdown_table(("field", "type", "what"), rows))
    return "\n".join(lines), tuple(order)


def _parts() -> Iterator[type]:
    waiting: list[type] = list(Plan.__mro__[1].__subclasses__())
    while waiting:
        one = waiting.pop()
        yield one
        waiting += one.__subclasses__()


def _type(one: Mapping[str, Any]) -> str:
    """A property of a JSON Schema in words."""
    if "$ref" in one:
        name = one["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in one:
        return " or ".join(_type(each) for each in one["anyOf"])
    if "enum" in one:
        return ", ".join(f"`{each}`" for each in one["enum"])
    if "const" in one:
        return f"`{one['const']}`"
    if one["type"] == "array":
        return "list of " + (_type(one["items"]) if one.get("items") else "values")
    if one["type"] == "object":
        inner = one.get("additionalProperties")
        return "object of " + (_type(inner) if isinstance(inner, dict) and inner else "values")
    return str(_KINDS.get(one["type"], one["type"]))


# CSV and TOML


def _tables() -> str:
    parts = {one.__name__: _attributes(one) for one in _parts()}
    told = {**parts["Performance"], **parts["StrategyInfo"]}
    helps = {name: one.help or "" for name, one in _told(estimate).items()}
    trials = [(f"`{one}`", _trial_kind(one), _what(one, "trials", told)) for one in TRIAL_COLUMNS]
    given = [
        (f"`{name}`", _default(column.default), _what(name, "points", helps))
        for name, column in INPUT_COLUMNS.items()
    ]

    def plain(names: Iterable[str], section: str) -> str:
        rows = ((f"`{name}`", _what(name, section, helps)) for name in names)
        return markdown_table(("column", "what"), rows)

    return "\n".join(
        (
            "## CSV files\n\nUTF-8, commas, one header line. Seconds, bytes, tokens and their "
            "rates.\n",
            "### trials.csv, pareto.csv\n\nOf `search`: a row a strategy, the best first.\n",
            markdown_table(("column", "type", "what"), trials),
            "### Points of `estimate --points`\n\nA cell that is empty and a column that is "
            "missing take the default; other columns go through as they are.\n",
            markdown_table(("column", "default", "what"), given),
            "### Answer of `estimate`\n\nAppended to each row.\n",
            plain(OUTPUT_COLUMNS, "answer"),
            "### Measured columns of `validate`\n\nA points file with one or more of these, and "
            "`group`, `held_out`, `source`, `note` where one likes.\n",
            markdown_table(
                ("column", "against"), ((f"`{a}`", f"`{b}`") for a, b in METRICS.items())
            ),
            "### requests.csv\n\nOf `simulate --out`: a row a request, in the order of the ends.\n",
            plain(REQUEST_COLUMNS, "requests"),
            "### Profile\n\nOf `profile --out`, read by `calibrate`: a row an operator and its "
            "sizes.\n",
            plain(PROFILE_COLUMNS, "profile"),
        )
    )


def _trial_kind(name: str) -> str:
    if name in SWITCH_COLUMNS:
        return "true, false"
    if name in WORD_COLUMNS:
        return "text"
    return "whole number" if name in INTEGER_COLUMNS else "number"


def _default(value: object) -> str:
    return "-" if value is None or value == "" else f"`{value}`"


def _files() -> str:
    return "\n".join(
        (
            "## TOML files\n\nStart from one in `costmodel/data/`. A fact is "
            '`key = { value = ..., kind = "datasheet|measured|derived|assumed", source = "..." }`. '
            "A key that is unknown, missing or out of range is refused. The unit is in the key: "
            "GB = 1e9 bytes, GiB = 2**30.\n",
            "### Device\n\nLabels: `name`, `title`, `vendor` (ascend, nvidia). Facts, and "
            "`soc_versions` of an Ascend device:\n",
            _keys(DEVICE_FIELDS, "device", Device),
            "### Cluster\n\nLabels: `name`, `title`, `device` (a name, a path beside the file, or "
            "a `[device]` table). Facts:\n",
            _keys(CLUSTER_FIELDS, "cluster", Cluster),
            "Each `[[tiers]]`, from the inside out, has `name`, `topology` "
            f"({', '.join(typing.get_args(Topology))}) and facts; `ranks` of the last may be "
            '`"all"`:\n',
            _keys({**TIER_RANKS, **TIER_FIELDS}, "tier", Tier),
            "### Engine profile\n\nLabels: `name`, `title`. Facts:\n",
            _keys(ENGINE_FIELDS, "engine", EngineProfile),
            "### Workload\n\nOf `search --workload` and `simulate --workload`; plain values, no "
            "facts. An option stands before the file. [`simulate.md`](simulate.md) has an "
            "example.\n",
            markdown_table(("key", "what"), ((f"`{key}`", _what(key, "workload")) for key in KEYS)),
            "### Device profile\n\nWhat `calibrate` writes, told in "
            "[`calibrate.md`](calibrate.md#the-profile).\n",
        )
    )


def _keys(fields: Mapping[str, Field], section: str, owner: type) -> str:
    told = _attributes(owner)
    rows = []
    for key, field in fields.items():
        what = _what(key, section, {key: _UNIT.sub(".", told.get(field.target, ""))})
        rows.append((f"`{key}`", _range(field), "may be left out" if field.optional else "", what))
    return markdown_table(("key", "value", "", "what"), rows)


def _range(field: Field) -> str:
    if field.choices:
        return "of " + ", ".join(field.choices)
    if field.shape in ("real", "count", "counts"):
        noun = {"real": "number", "count": "whole number", "counts": "whole numbers"}[field.shape]
        return f"{noun}, {_amount(field.low)} to {_amount(field.high)}"
    return {"flag": "true, false", "word": "a name", "words": "names"}[field.shape]


def _amount(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _rules() -> str:
    rows = [
        (f"`{one.id}`", one.sentence, _scope(one.devices), _scope(one.engines))
        for one in rules().values()
    ]
    return (
        f"## Legality rules\n\n{len(rows)} rules; their sources stand in `search/data/rules.toml`. "
        "`search --explain-space` counts what each removes.\n\n"
        + markdown_table(("id", "rule", "devices", "engines"), rows)
    )


def _scope(scope: str | tuple[str, ...]) -> str:
    return scope if isinstance(scope, str) else ", ".join(scope)


def _shipped() -> str:
    names = {
        "models": model_names(),
        "devices": device_names(),
        "clusters": cluster_names(),
        "engine profiles": engine_names(),
    }
    rows = [(what, ", ".join(f"`{one}`" for one in found)) for what, found in names.items()]
    return "## What ships\n\n" + markdown_table(("what", "names"), rows)
