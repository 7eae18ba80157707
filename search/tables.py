"""Tables for people: what the commands print. Milliseconds and GiB appear here only.

Text that comes from files or models is printed as it is, never as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shardplan.search.plan import ProofInfo

__all__ = [
    "bytes_text",
    "cluster_table",
    "device_table",
    "fact_table",
    "memory_table",
    "model_table",
    "new_table",
    "print_confidence",
    "print_estimate",
    "print_proof",
    "rate_text",
    "seconds_text",
    "share_bar",
    "show",
    "time_table",
]

_GIB = 2.0**30
_BAR = 24
_MOST_ROWS = 12
_MILLI = 1e-3
_PLAIN_RATE = 100.0


def seconds_text(seconds: float) -> str:
    """Seconds in the unit that people use for that size."""
    if seconds >= 1.0:
        return f"{seconds:,.2f} s"
    if seconds >= _MILLI:
        return f"{seconds / _MILLI:.2f} ms"
    return f"{seconds * 1e6:.1f} us"


def bytes_text(count: float) -> str:
    """Bytes as GiB, small ones as MiB."""
    return f"{count / _GIB:.2f} GiB" if count >= 0.1 * _GIB else f"{count / 2**20:.1f} MiB"


def rate_text(rate: float) -> str:
    """A rate with three or more digits."""
    return f"{rate:,.0f}" if rate >= _PLAIN_RATE else f"{rate:.3g}"


def new_table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the house's look; columns named in `right` hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for place, name in enumerate(columns):
        number = name in right
        table.add_column(name, justify="right" if number else "left", no_wrap=number or not place)
    return table


def show(console: Console, table: Table) -> None:
    """Print a table and a blank line."""
    console.print(table)
    console.print()


def add(table: Table, *cells: object) -> None:
    """A row of cells, none of which is markup."""
    from rich.markup import escape

    table.add_row(*(escape(str(cell)) for cell in cells))


def share_bar(share: float, width: int = _BAR) -> str:
    """A bar of `share` of the width; more than the whole ends in a mark."""
    filled = round(max(0.0, min(share, 1.0)) * width)
    return "█" * filled + "░" * (width - filled) + ("!" if share > 1.0 else "")


def _value(fact: Any) -> Any:
    return fact["value"] if isinstance(fact, Mapping) and "value" in fact else fact


def device_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The devices by name."""
    numbers = ("16-bit TFLOP/s", "HBM", "HBM GB/s")
    table = new_table("devices", "name", *numbers, "weights", right=numbers)
    for row in rows:
        rates = {key: _value(rate) for key, rate in row["flop_per_s"].items()}
        add(
            table,
            row["name"],
            f"{max(rates.get('bf16', 0.0), rates.get('fp16', 0.0)) / 1e12:.0f}",
            f"{_value(row['hbm_bytes']) / _GIB:.0f} GiB",
            f"{_value(row['hbm_bytes_per_s']) / 1e9:.0f}",
            " ".join(_value(row["weight_dtypes"])),
        )
    return table


def cluster_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The clusters by name."""
    numbers = ("ranks", "a node", "nodes", "at most")
    table = new_table("clusters", "name", "device", *numbers, "tiers", right=numbers)
    for row in rows:
        tiers = ", ".join(f"{tier['name']} ({tier['topology']})" for tier in row["tiers"])
        sizes = (_value(row[key]) for key in ("ranks_per_node", "nodes", "max_nodes"))
        add(table, row["name"], row["device"], row["ranks"], *sizes, tiers)
    return table


def model_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The presets by name."""
    numbers = ("parameters", "active", "KV a token", "layers", "experts")
    table = new_table("models", "name", *numbers, "weights", right=numbers)
    for row in rows:
        add(
            table,
            row["name"],
            f"{row['parameters'] / 1e9:,.2f} B",
            f"{row['active_parameters'] / 1e9:,.2f} B",
            f"{row['kv_bytes_per_token'] / 1024:,.1f} KiB",
            row["layers"],
            row["experts"] or "",
            row["dtype"],
        )
    return table


def fact_table(row: Mapping[str, Any]) -> Table:
    """One device, cluster or model in full, with the source of each number."""
    table = new_table(str(row["name"]), "what", "value", "kind", "source")
    for name, fact in _facts("", row):
        if isinstance(fact, Mapping):
            add(table, name, _short(fact["value"]), fact["kind"], fact["source"])
        else:
            add(table, name, _short(fact), "", "")
    return table


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    return str(value)


def _facts(prefix: str, value: Any) -> list[tuple[str, Any]]:
    """(dotted name, fact or plain value) of a summary."""
    found: list[tuple[str, Any]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping) and not {"value", "kind", "source"} <= set(item):
            found += _facts(f"{name}.", item)
        elif isinstance(item, list) and item and isinstance(item[0], Mapping):
            for one in item:
                found += _facts(f"{name}.{one.get('name', '')}.", one)
        else:
            found.append((name, item))
    return found


def time_table(title: str, rows: Sequence[Mapping[str, Any]], step_s: float) -> Table:
    """Seconds of one step by kind of operator, longest first; the small ones as one row."""
    numbers = ("calls", "time", "share")
    table = new_table(title, "kind", *numbers, "", "bound by", "basis", right=numbers)
    shown = list(rows[:_MOST_ROWS])
    for row in shown:
        parts = {key: row[f"{key}_s"] for key in ("compute", "memory", "collective", "overhead")}
        share = row["total_s"] / step_s if step_s else 0.0
        bound = max(parts, key=lambda key: parts[key])
        cells = (row["kind"], row["calls"], seconds_text(row["total_s"]), f"{share:.1%}")
        add(table, *cells, share_bar(share, 16), bound, row.get("basis", ""))
    rest = rows[_MOST_ROWS:]
    if rest:
        total = sum(row["total_s"] for row in rest)
        calls = sum(row["calls"] for row in rest)
        name = f"{len(rest)} more"
        add(table, name, calls, seconds_text(total), f"{total / step_s:.1%}", "", "", "")
    return table


def memory_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes on one rank of each stage, against what the engine may use."""
    numbers = ("layers", "weights", "KV cache", "activations", "other", "total")
    table = new_table("memory of one rank", "stage", *numbers, "of capacity", right=numbers)
    for row in rows:
        other = row["communicators_bytes"] + row["reserve_bytes"]
        share = row["total_bytes"] / row["capacity_bytes"]
        held = [row[f"{name}_bytes"] for name in ("weights", "kv_cache", "activations")]
        cells = [bytes_text(count) for count in (*held, other, row["total_bytes"])]
        add(table, row["stage"], row["layers"], *cells, f"{share_bar(share, 12)} {share:.0%}")
    return table


_LABELS = {
    "step_s": "step",
    "compute_s": "  compute and memory",
    "collective_s": "  collectives",
    "overhead_s": "  overhead",
    "ttft_mean_s": "TTFT mean",
    "ttft_p50_s": "TTFT p50",
    "ttft_p90_s": "TTFT p90",
    "ttft_p99_s": "TTFT p99",
    "tpot_mean_s": "TPOT mean",
    "tpot_p50_s": "TPOT p50",
    "tpot_p90_s": "TPOT p90",
    "tpot_p99_s": "TPOT p99",
}


def print_confidence(sure: Mapping[str, Any], console: Console) -> None:
    """What a price rests on, and what would make it surer."""
    from shardplan.search.how_sure import basis_words

    weak = sure["weakest"]
    console.print(f"rests on: {basis_words(sure['basis'])}", markup=False)
    share = f"{weak['error_share']:.0%} of what all parts add to the band"
    console.print(f"weakest: {weak['name']} ({weak['kind']}), {share}", markup=False)
    console.print(f"surer: {weak['advice']}", markup=False)
    console.print()


def print_estimate(found: Mapping[str, Any], console: Console) -> None:
    """One point: its price, what time and memory are made of, what was assumed."""
    point = ", ".join(f"{name}={value}" for name, value in found["point"].items())
    console.print(point, markup=False)
    table = new_table("price", "what", "value", right=("value",))
    for name, label in _LABELS.items():
        if name in found and (found[name] or not label.startswith(" ")):
            add(table, label, seconds_text(found[name]))
    for name, label in (
        ("output_tokens_per_s", "output tokens/s"),
        ("requests_per_s", "requests/s"),
    ):
        if name in found:
            add(table, label, rate_text(found[name]))
    if "memory_bytes" in found:
        held, capacity = found["memory_bytes"], found["capacity_bytes"]
        add(table, "memory, fullest rank", f"{bytes_text(held)} of {bytes_text(capacity)}")
    if "confidence" in found:
        sure, step_s = found["confidence"], found["step_s"]
        ends = (seconds_text(step_s * sure[end]) for end in ("low_factor", "high_factor"))
        add(table, f"step, {sure['level']:.0%} band", " to ".join(ends))
        if "output_tokens_per_s_low" in found:
            rates = (rate_text(found[f"output_tokens_per_s_{end}"]) for end in ("low", "high"))
            add(table, f"output tokens/s, {sure['level']:.0%} band", " to ".join(rates))
    show(console, table)
    if "confidence" in found:
        print_confidence(found["confidence"], console)
    if "breakdown" in found:
        host = {"kind": "engine", "calls": 0, "compute_s": 0.0, "memory_s": 0.0}
        host |= {"collective_s": 0.0, "overhead_s": found["host_s"], "total_s": found["host_s"]}
        rows = sorted([*found["breakdown"], host], key=lambda row: -row["total_s"])
        show(console, time_table("time of one step", rows, found["step_s"]))
        show(console, memory_table(found["memory"]))
    if found["message"]:
        console.print(f"note: {found['message']}", markup=False)


def print_proof(proof: ProofInfo, what: str, console: Console) -> None:
    """Each check, and the verdict."""
    console.print(f"proof of {what}, level {proof.level}", markup=False)
    for check in proof.checks:
        console.print(f"  ok    {check}", markup=False)
    for check in proof.failures:
        console.print(f"  FAIL  {check}", markup=False)
    count = len(proof.checks) + len(proof.failures)
    verdict = "all hold" if proof.passed else f"{len(proof.failures)} fail"
    console.print(f"{count} checks, {verdict}", markup=False)
