"""A PostgreSQL server of a test's own, in a temporary folder, and `shardplan` processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
_ENTRY = "import sys; from shardplan.search.main import main; sys.exit(main())"
_SETTINGS = ("fsync=off", "listen_addresses=", "shared_buffers=16MB", "max_connections=60")


def start(*arguments: str) -> subprocess.Popen[str]:
    """One command line in a process of its own."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", _ENTRY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )


def _program(name: str) -> str | None:
    """A program of PostgreSQL: on the path, or where Debian puts it."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def _as_server(command: Sequence[str]) -> None:
    """Run as the user `postgres` where we are root, which PostgreSQL refuses to be."""
    lead = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    # Not to a pipe: the server that pg_ctl leaves behind would hold it open.
    with tempfile.TemporaryFile() as said:
        done = subprocess.run([*lead, *command], cwd="/", stdout=said, stderr=said, check=False)
        said.seek(0)
        if done.returncode:
            pytest.skip(f"PostgreSQL does not start: {said.read().decode(errors='replace')[-300:]}")


@contextmanager
def postgres() -> Iterator[str]:
    """The address of a server that lives as long as the context; skips where there is none."""
    pytest.importorskip("psycopg", reason="no psycopg, which talks to PostgreSQL")
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: a socket's path has 107 bytes at most
    try:
        if os.geteuid() == 0:
            try:
                shutil.chown(folder, "postgres")
            except LookupError:
                pytest.skip("no user postgres, and root may not run PostgreSQL")
        data = str(folder / "data")
        _as_server([initdb, "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"])
        options = " ".join(f"-c {one}" for one in (*_SETTINGS, f"unix_socket_directories={folder}"))
        log = str(folder / "log")
        _as_server([pg_ctl, "-D", data, "-l", log, "-w", "-o", options, "start"])
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            _as_server([pg_ctl, "-D", data, "-m", "immediate", "-w", "stop"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
