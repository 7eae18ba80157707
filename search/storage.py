"""Where studies live: in memory, or in any storage of Optuna's that many machines may share.

    sqlite:///study.db, postgresql://..., mysql://...    a database
    journal:study.log                                    a journal file, safe on shared folders
    grpc://host:port                                     Optuna's storage proxy

A process that is killed while it writes may leave half a line at the end of a journal, which
nobody has been told is written; whoever holds the lock next cuts it off, else the line that
follows would be lost with it. Databases do the like themselves.

Passwords in an address are masked in every message.
"""

from __future__ import annotations

import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import InputError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

__all__ = ["masked", "open_storage", "quiet_optuna", "refusal", "talking"]

_GRPC_PORT = 13000
_CONNECT_S = 10
_SQLITE_WAIT_S = 60
"""Most that one writer of an SQLite file waits for another."""
_LOCK_S = 15
"""A lock on a journal that is held longer is of a process that died: writes take milliseconds."""
_HINT = "try sqlite:///study.db or journal:study.log"
_GO_ON = "finished trials are kept; go on with --resume once it can be written again"
_DRIVERS = {
    "postgresql": ("psycopg2", "psycopg"),
    "postgres": ("psycopg2", "psycopg"),
    "mysql": ("MySQLdb", "pymysql"),
}
"""By scheme: SQLAlchemy's own driver, and the one that is taken where only that is installed."""
_INSTALL = {
    "postgres": "pip install 'psycopg[binary]'",
    "mysql": "pip install pymysql",
    "redis": "pip install redis",
    "grpc": "pip install grpcio protobuf",
}
_OF_STORAGES = {
    *("alembic", "grpc", "optuna", "redis", "sqlalchemy"),
    *("MySQLdb", "psycopg", "psycopg2", "pymysql"),
}


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna logs errors alone inside; its level is as before afterwards."""
    from optuna import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def open_storage(address: str | None) -> BaseStorage:
    """The storage at an address; `InputError` when it cannot be opened."""
    from optuna import storages

    if address is None:
        return storages.InMemoryStorage()
    scheme, _, rest = address.partition(":")
    try:
        if scheme == "journal":
            return _journal(rest)
        if scheme == "grpc":
            host, _, port = rest.removeprefix("//").partition(":")
            with warnings.catch_warnings():  # it is experimental, which a user need not hear
                warnings.simplefilter("ignore")
                proxy = storages.GrpcStorageProxy(host=host, port=int(port or _GRPC_PORT))
            proxy.wait_server_ready(timeout=_CONNECT_S)
            return proxy
        if scheme.startswith("redis"):
            return storages.get_storage(address)
        return _database(address)
    except Exception as error:  # every driver and dialect raises errors of its own
        raise refusal(address, error) from None


def _journal(path: str) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    # Absolute: the lock is a link beside the file, and a relative one would lead nowhere.
    file = os.path.abspath(path)

    class MendingLock(JournalFileSymlinkLock):
        """Whoever holds it finds whole lines only."""

        def acquire(self) -> bool:
            held = super().acquire()
            try:
                cut_torn_line(file)
            except BaseException:
                self.release()
                raise
            return held

    lock = MendingLock(file, grace_period=_LOCK_S)
    return JournalStorage(JournalFileBackend(file, lock_obj=lock))


def cut_torn_line(path: str) -> None:
    """Drop what follows the last line's end of a file, if anything does."""
    with open(path, "rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 4096, 0)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)


class _LoggingAhead(sqlite3.Connection):
    """Writes go to a log that is synced now and then: a trial is a dozen commits.

    A process that is killed loses nothing; a machine that loses its power loses its last commits
    at most.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


def _database(address: str) -> BaseStorage:
    from optuna.storages import RDBStorage

    scheme, separator, rest = address.partition("://")
    usual, other = _DRIVERS.get(scheme, ("", ""))
    if scheme in _DRIVERS:
        scheme = "postgresql" if scheme == "postgres" else scheme
        if find_spec(usual) is None and find_spec(other) is not None:
            scheme = f"{scheme}+{other}"
        address = f"{scheme}{separator}{rest}"
    arguments: dict[str, Any] = {}
    if scheme.startswith("sqlite"):
        arguments = {"connect_args": {"timeout": _SQLITE_WAIT_S, "factory": _LoggingAhead}}
    elif scheme.startswith(("postgresql", "mysql")):
        arguments = {"pool_pre_ping": True}
        if "connect_timeout" not in rest:
            arguments["connect_args"] = {"connect_timeout": _CONNECT_S}
    return RDBStorage(address, engine_kwargs=arguments)


@contextmanager
def talking(address: str | None) -> Iterator[None]:
    """A storage that fails inside (down, full, read-only, deleted) becomes one `InputError`."""
    try:
        yield
    except Exception as error:
        if address is None or not _of_storage(error):
            raise
        raise refusal(address, error, "cannot be read or written", _GO_ON) from None


def _of_storage(error: Exception) -> bool:
    """Whether a storage or its driver raised it."""
    if isinstance(error, InputError):
        return False
    kinds = {one.__module__.partition(".")[0] for one in type(error).__mro__}
    trace, within = error.__traceback__, False
    while trace is not None:  # what a storage holds may be wrong for whatever reads it there
        place = str(trace.tb_frame.f_globals.get("__name__", ""))
        within = within or place.startswith(("optuna.storages", "sqlalchemy"))
        trace = trace.tb_next
    return isinstance(error, OSError) or bool(kinds & _OF_STORAGES) or within


def masked(text: str) -> str:
    """The text without the passwords of addresses in it."""
    text = re.sub(r"//([^:/@\s]*):[^/\s]*@", r"//\1:***@", text)
    return re.sub(r"(?i)(password=)[^&\s]+", r"\1***", text)


def refusal(
    address: str, error: Exception, what: str = "cannot be opened", hint: str = _HINT
) -> InputError:
    """One line, without a password: what the driver itself said."""
    root: BaseException = error
    while (inner := getattr(root, "orig", None) or root.__cause__) is not None:
        root = inner
    reason = masked(str(root).strip().partition("\n")[0])
    got = f"{masked(address)}: {type(root).__name__}"
    if isinstance(error, ImportError):
        hint = next((h for s, h in _INSTALL.items() if address.startswith(s)), hint)
    elif "storage upgrade" in str(error):
        hint = "run `optuna storage upgrade --storage URL`, or take the Optuna that made it"
    return InputError(
        f"the storage of the study {what}",
        got=f"{got}: {reason}" if reason else got,
        hint=hint,
    )
