"""Where a study lives: in memory, or in any storage of Optuna's, bound to one question.

    sqlite:///study.db, postgresql://..., mysql://...    a database
    journal:study.log                                    a journal file, safe on shared folders
    grpc://host:port                                     Optuna's storage proxy

Passwords in an address are masked in every message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from shardplan.models.errors import InputError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study

__all__ = ["Direction", "open_storage", "open_study", "quiet_optuna"]

Direction = Literal["maximize", "minimize"]
_DIGEST = "shardplan_question"
_GRPC_PORT = 13000
_HINT = "try sqlite:///study.db or journal:study.log"


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
            from optuna.storages.journal import JournalFileBackend

            return storages.JournalStorage(JournalFileBackend(rest))
        if scheme == "grpc":
            host, _, port = rest.removeprefix("//").partition(":")
            proxy = storages.GrpcStorageProxy(host=host, port=int(port or _GRPC_PORT))
            proxy.wait_server_ready(timeout=10)
            return proxy
        return storages.get_storage(address)
    except Exception as error:  # every driver and dialect raises errors of its own
        raise _refused(address, error) from None


def open_study(
    address: str | None,
    name: str | None,
    digest: str,
    sampler: BaseSampler,
    directions: Sequence[Direction],
) -> Study:
    """The study of a question: made anew, or the one that the storage holds.

    Without a `name` it is called after the digest. `InputError` when the storage cannot be
    opened or its study of that name belongs to another question.
    """
    import optuna

    opened = open_storage(address)
    name = name or f"shardplan-{digest[:12]}"
    try:
        study = optuna.create_study(
            storage=opened,
            study_name=name,
            sampler=sampler,
            directions=list(directions),
            load_if_exists=True,
        )
        held = study.user_attrs.get(_DIGEST)
        if held is None and not study.get_trials(deepcopy=False):
            study.set_user_attr(_DIGEST, digest)
            held = digest
    except Exception as error:  # as above: the first question may be the first connection
        raise _refused(address or "memory", error) from None
    if held != digest:
        raise InputError(
            "a study is continued with the question that it was started with",
            got=f"study {name!r} belongs to another model, cluster, workload, space or version",
            hint="take another study name, or leave it out",
        )
    return study


def _refused(address: str, error: Exception) -> InputError:
    """One line, without a password."""
    masked = re.sub(r"//([^:/@]*):[^@]*@", r"//\1:***@", address)
    reason = str(error).strip().partition("\n")[0]
    reason = re.sub(r"//([^:/@]*):[^@]*@", r"//\1:***@", reason)
    got = f"{masked}: {type(error).__name__}"
    return InputError(
        "the storage of the study cannot be opened",
        got=f"{got}: {reason}" if reason else got,
        hint=_HINT,
    )
