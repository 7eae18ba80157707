"""Storages that break: what is said, and what is kept."""

from __future__ import annotations

import json
import resource
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tests.search.shared_study import search_small

from shardplan.models.errors import InputError
from shardplan.search import workers
from shardplan.search.joined import draw_for
from shardplan.search.kept import Kept
from shardplan.search.storage import cut_torn_line, masked, open_storage
from shardplan.search.study import Place


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return f"journal:{tmp_path / 'study.log'}"


def _name(one: Kept) -> tuple[object, ...]:
    return one.parallel, one.choice, one.batch, one.chunk


def test_half_a_line_of_a_killed_writer_is_cut_off(journal: str) -> None:
    first = search_small(Place(storage=journal, name="s"), 3)
    file = Path(journal.partition(":")[2])
    with file.open("ab") as out:
        out.write(b'{"op_code":8,"worker_id":"gone","trial_')
    second = search_small(Place(storage=journal, name="s", resume=True), 5)
    assert {_name(one) for one in first.kept} <= {_name(one) for one in second.kept}
    assert all(json.loads(line) for line in file.read_text().splitlines())


@pytest.mark.parametrize(
    ("held", "kept"), [(b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nbc", b"a\n"), (b"abc", b"")]
)
def test_only_what_follows_the_last_line_is_cut(tmp_path: Path, held: bytes, kept: bytes) -> None:
    file = tmp_path / "log"
    file.write_bytes(held)
    cut_torn_line(str(file))
    assert file.read_bytes() == kept
    file.write_bytes(b"x" * 10_000 + b"\n" + b"y" * 10_000)
    cut_torn_line(str(file))
    assert file.stat().st_size == 10_001


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond a size: what a full disk is like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_loses_nothing(
    journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial in hand could not be given back: it is drawn again once its silence has lasted."""
    monkeypatch.setattr(workers, "GRACE_S", 0.5)
    first = search_small(Place(storage=journal, name="s"), 3)
    size = Path(journal.partition(":")[2]).stat().st_size
    again = Place(storage=journal, name="s", resume=True)
    with (
        _files_of_at_most(size + 1500),
        pytest.raises(InputError, match=r"cannot be read or written.*go on with --resume") as error,
    ):
        search_small(again, 30)
    assert "\n" not in str(error.value)
    found = search_small(again, 6)
    assert {_name(one) for one in first.kept} <= {_name(one) for one in found.kept}


def test_a_read_only_database_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    search_small(Place(storage=f"sqlite:///{file}", name="s"), 2)
    with pytest.raises(InputError, match="readonly database"):
        search_small(
            Place(storage=f"sqlite:///file:{file}?mode=ro&uri=true", name="s", resume=True), 3
        )


def test_a_database_of_another_optuna_says_how_to_upgrade(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    search_small(Place(storage=f"sqlite:///{file}", name="s"), 1)
    with closing(sqlite3.connect(file)) as base, base:
        base.execute("UPDATE version_info SET schema_version = 1")
        base.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    with pytest.raises(InputError, match="cannot be opened") as error:
        search_small(Place(storage=f"sqlite:///{file}", name="s", resume=True), 2)
    assert "\n" not in str(error.value)
    assert "upgrade" in str(error.value)


@pytest.mark.slow
def test_a_proxy_stands_between_workers_and_a_storage(tmp_path: Path) -> None:
    """Optuna's own server; when it is gone that is one line, and what it was told is kept."""
    pytest.importorskip("grpc", reason="no grpcio, which Optuna's proxy runs on")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base, url = f"sqlite:///{tmp_path / 'study.db'}", f"grpc://127.0.0.1:{port}"
    serve = (
        "import optuna, sys; from optuna.storages import run_grpc_proxy_server as run; "
        "run(optuna.storages.RDBStorage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    server = subprocess.Popen([sys.executable, "-c", serve, base, str(port)])
    try:
        first = search_small(Place(storage=url, name="s"), 4)
        assert draw_for(url, "s")["finished"] == 4
    finally:
        server.kill()
        server.wait()
    with pytest.raises(InputError, match="storage of the study"):
        search_small(Place(storage=url, name="s", resume=True), 6)
    assert search_small(Place(storage=base, name="s", resume=True), 4).kept == first.kept


def test_a_study_that_is_deleted_meanwhile_is_one_line(journal: str) -> None:
    def delete(_done: int, _wanted: int) -> None:
        storage = open_storage(journal)
        storage.delete_study(storage.get_study_id_from_name("s"))

    with pytest.raises(InputError, match="cannot be read or written"):
        search_small(Place(storage=journal, name="s"), 5, progress=delete)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("mysql://me:p@ss:secret@host:1/db", "mysql://me:***@host:1/db"),
        (
            "postgresql://host/db?user=me&password=secret",
            "postgresql://host/db?user=me&password=***",
        ),
        ("sqlite:///a.db", "sqlite:///a.db"),
    ],
)
def test_passwords_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(f"could not connect to {text} now") == f"could not connect to {shown} now"
