"""Edits of files that are no text: what is inside them, or their bytes."""

from __future__ import annotations

import contextlib
import gzip
import io
import sqlite3
import zipfile
from collections.abc import Sequence
from random import Random
from typing import Any

from tests.fuzz.mutate import EDITS, VALUES, edit_bytes, edit_json

__all__ = ["edit_gzip", "edit_onnx", "edit_parquet", "edit_sqlite", "edit_zip"]


def edit_gzip(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """The text inside edited, or the archive's own bytes."""
    if chance.random() < 0.5:
        return edit_bytes(data, others, chance)
    return gzip.compress(edit_bytes(gzip.decompress(data), (), chance), mtime=0)


def edit_zip(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """One member edited, JSON as a tree, or removed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice([one for one in held if one.endswith(".json")] * 2 + list(held))
    match chance.randint(0, 9):
        case 0:
            del held[name]
        case 1:
            held[name] = edit_bytes(held[name], (), chance)
        case _:
            edit = edit_json if name.endswith(".json") else edit_bytes
            held[name] = edit(held[name], (), chance)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for one, content in held.items():
            archive.writestr(one, content)
    return out.getvalue()


def edit_onnx(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """An ONNX model: names, operators, attributes, dims and types changed, nodes removed."""
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    for _ in range(chance.choice(EDITS)):
        node = chance.choice(graph.node) if graph.node else None
        match chance.randint(0, 8):
            case 0 if node is not None:
                graph.node.remove(node)
            case 1 if node is not None:
                node.op_type = chance.choice(
                    [one.op_type for one in graph.node] + ["If", "Loop", "Foo", "Reshape", "Slice"]
                )
            case 2 if node is not None and node.input:
                names = [one for other in graph.node for one in (*other.input, *other.output)]
                node.input[chance.randrange(len(node.input))] = chance.choice([*names, "", "none"])
            case 3 if node is not None and node.attribute:
                one = chance.choice(node.attribute)
                one.i = chance.choice((0, -1, 1, 2**31, 2**62, -(2**62), 7))
                one.ints[:] = [chance.choice((0, -1, 2**40, 3)) for _ in one.ints]
            case 4 if graph.initializer:
                tensor = chance.choice(graph.initializer)
                tensor.dims[:] = [chance.choice((0, -1, 1, 8, 2**40)) for _ in tensor.dims]
            case 5 if graph.initializer:
                chance.choice(graph.initializer).data_type = chance.randint(0, 25)
            case 6 if graph.input:
                for dim in chance.choice(graph.input).type.tensor_type.shape.dim:
                    dim.dim_value = chance.choice((0, -1, 1, 8, 2**31, 2**62))
            case 7 if node is not None:
                graph.node.insert(chance.randrange(len(graph.node)), node)
            case _:
                if model.opset_import:
                    model.opset_import[0].version = chance.choice((0, 1, 12, 13, 18, 99, 2**40))
    found: bytes = model.SerializeToString()
    return found


def edit_sqlite(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """Cells of a database edited, rows or tables removed; or the bytes of its pages."""
    if chance.random() < 0.3:
        return edit_bytes(data, others, chance)
    with contextlib.closing(sqlite3.connect(":memory:")) as held:
        held.deserialize(data)
        names = held.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        tables = [name for (name,) in names if not name.startswith("sqlite")]
        for _ in range(chance.choice(EDITS)):
            _edit_row(held, chance.choice(tables), chance)
        held.commit()
        return held.serialize()


def _edit_row(held: sqlite3.Connection, table: str, chance: Random) -> None:
    """One cell, row or table; what the database's own rules refuse stays as it is."""
    columns = [name for _, name, *_ in held.execute(f'PRAGMA table_info("{table}")')]
    rows = held.execute(f'SELECT rowid, * FROM "{table}"').fetchall()
    if not columns or not rows or chance.random() < 0.05:
        held.execute(f'DROP TABLE IF EXISTS "{table}"')
        return
    row, column = chance.choice(rows), chance.randrange(len(columns))
    cell = row[1 + column]
    if chance.random() < 0.1:
        held.execute(f'DELETE FROM "{table}" WHERE rowid = ?', row[:1])
        return
    if isinstance(cell, str) and chance.random() < 0.7:
        text = cell.encode("utf-8")
        new: Any = (edit_json if cell[:1] in "[{" else edit_bytes)(text, (), chance)
        new = new.decode("utf-8", "replace")
    else:
        new = chance.choice([one for one in VALUES if isinstance(one, str | float | None)])
        new = new.encode("utf-8", "replace") if isinstance(new, str) else new
    with contextlib.suppress(sqlite3.Error):
        held.execute(f'UPDATE "{table}" SET "{columns[column]}" = ? WHERE rowid = ?', (new, row[0]))


def edit_parquet(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """A table with cells of a column replaced or of another type; or the bytes of the file."""
    if chance.random() < 0.3:
        return edit_bytes(data, others, chance)
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(io.BytesIO(data))
    for _ in range(chance.choice(EDITS)):
        at = chance.randrange(table.num_columns)
        cells = table.column(at).to_pylist()
        match chance.randint(0, 4):
            case 0:
                table = table.remove_column(at)
                continue
            case 1:
                cells = [chance.choice((None, [cell], {"a": cell})) for cell in cells]
            case 2:
                cells = [str(cell) for cell in cells]
            case 3:
                cells = [chance.choice(VALUES)] * len(cells)
            case _:
                cells[chance.randrange(len(cells))] = chance.choice((None, -1, 0, 1e300, "x", True))
        table = table.set_column(at, table.column_names[at], pyarrow.array(cells))
    written = io.BytesIO()
    parquet.write_table(table, written)
    return written.getvalue()
