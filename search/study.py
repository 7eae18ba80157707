"""A study of Optuna's, bound to one question of ours, which it carries with it.

Its user attributes, all of them JSON:

    shardplan_digest       of the question, the space, the coefficients and the version
    shardplan_version      of the shardplan that made it
    shardplan_engine       the sampling engine and its seed: [engine, seed]
    shardplan_trials       how many finished trials it shall hold
    shardplan_question:0,  the whole question, cut into pieces that every database takes
    ...                    (MySQL's TEXT holds 64 KiB)

The question holds what files said, not where they lay, so that a worker on another machine needs
nothing but the address and the name. Sources and titles of numbers are no part of the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from shardplan import __version__
from shardplan.costmodel.kernels.base import Machine
from shardplan.models.errors import InputError
from shardplan.search.dimensions import Dimensions
from shardplan.search.evaluate import Question
from shardplan.search.request import Resolved
from shardplan.search.samplers import SampledEngine, directions, per_trial
from shardplan.search.space import Space
from shardplan.search.storage import open_storage, refusal
from shardplan.search.trial_result import read_attribute

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study

__all__ = ["Joined", "Place", "decode", "encode", "join_study", "open_study", "study_digest"]

_PIECE = 16_000
_NOT_PRICED = ("facts", "source", "title", "extra", "notes")
_MOST_LISTED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a study is kept."""

    storage: str | None = None
    """An address of `shardplan.search.storage`; None is memory."""
    name: str | None = None
    """None: after the digest of the question."""
    resume: bool = False
    """Go on with a study that is there; one of a name that was given is else an error."""
    first: bool = True
    """Of the studies of one search; those after it may not have been reached when it stopped."""

    def named(self, word: str, *, first: bool = False) -> Place:
        """The place of one of several studies of the same search."""
        name = self.name and f"{self.name}-{word}"
        return replace(self, name=name, first=self.first and first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A study that was made elsewhere, and the question it carries."""

    study: Study
    resolved: Resolved
    cards: int
    engine: SampledEngine
    digest: str


def plain(value: Any) -> Any:
    """Dataclasses, pydantic models and mappings as what JSON holds."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [plain(item) for item in value]
    return value


def canonical(value: Any) -> str:
    """The same data give the same text."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"))


def _without_sources(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_sources(v) for k, v in value.items() if k not in _NOT_PRICED}
    return [_without_sources(item) for item in value] if isinstance(value, list) else value


def study_digest(question: Question, space: Space, engine: SampledEngine) -> str:
    """What a study is bound to: the question, the space, the prices' version and coefficients."""
    parts = (
        __version__,
        question,
        Machine.of(question.cluster.device, question.engine.name).calibration,
        Dimensions(space).values(),
        len(space.layouts),
        space.choices,
        space.batches,
        space.chunks,
        len(directions(engine)),
    )
    text = canonical(_without_sources(plain(parts)))
    return hashlib.sha256(text.encode()).hexdigest()


def encode(resolved: Resolved, cards: int) -> str:
    """The whole question as canonical JSON."""
    return canonical({"resolved": resolved, "cards": cards})


def decode(text: str) -> tuple[Resolved, int]:
    """(question, cards) of what `encode` wrote. `InputError` for anything else."""
    try:
        data = json.loads(text)
        return TypeAdapter(Resolved).validate_python(data["resolved"]), int(data["cards"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise InputError(
            "the question that a study carries can be read",
            got=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:80]}",
            hint="start the study anew with `shardplan search --storage URL --study NAME`",
        ) from None


def _write(study: Study, digest: str, engine: SampledEngine, seed: int, question: str) -> None:
    """All attributes, the digest last: a study without one was not made to the end."""
    for at in range(0, len(question), _PIECE):
        study.set_user_attr(f"shardplan_question:{at // _PIECE}", question[at : at + _PIECE])
    study.set_user_attr("shardplan_version", __version__)
    study.set_user_attr("shardplan_engine", [engine, seed])
    study.set_user_attr("shardplan_digest", digest)


def _read(attributes: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    while f"shardplan_question:{len(pieces)}" in attributes:
        pieces.append(str(attributes[f"shardplan_question:{len(pieces)}"]))
    return "".join(pieces)


def _check_version(name: str, attributes: Mapping[str, Any]) -> None:
    held = attributes.get("shardplan_version")
    if held not in (None, __version__):
        raise InputError(
            "a study goes on with the shardplan that it was made with: others price otherwise",
            got=f"study {name!r} is of {held}, this is {__version__}",
            hint=f"install shardplan {held}, or start a study of another name",
        )


def open_study(
    place: Place,
    *,
    digest: str,
    engine: SampledEngine,
    seed: int,
    trials: int,
    question: str = "",
) -> Study:
    """The study of a question: made anew, or the one that the storage holds.

    `InputError` when the storage cannot be opened, when its study of that name belongs to another
    question or version, when one of a given name is there and `resume` was not said, and when it
    was and none is.
    """
    import optuna

    opened = open_storage(place.storage)
    name = place.name or f"shardplan-{digest[:12]}"
    try:
        names = _names(opened)
        _check_known(place, name, names)
        study = optuna.create_study(
            storage=opened,
            study_name=name,
            sampler=per_trial(engine, seed),
            directions=directions(engine),
            load_if_exists=True,
        )
        attributes = study.user_attrs
        if "shardplan_digest" not in attributes and not study.get_trials(deepcopy=False):
            _write(study, digest, engine, seed, question)
            attributes = study.user_attrs
        if attributes.get("shardplan_digest") == digest:
            study.set_user_attr("shardplan_trials", trials)
    except InputError:
        raise
    except Exception as error:  # the first question may be the first connection
        raise refusal(place.storage or "memory", error) from None
    if attributes.get("shardplan_digest") != digest:
        _check_version(name, attributes)
        raise InputError(
            "a study is continued with the question that it was started with",
            got=f"study {name!r} belongs to another model, cluster, workload, space or engine",
            hint="take another study name, or leave it out",
        )
    return study


def _names(storage: BaseStorage) -> list[str]:
    return [one.study_name for one in storage.get_all_studies()]


def _check_known(place: Place, name: str, names: Sequence[str]) -> None:
    """Whether a study is there as it should be."""
    if place.resume and place.first and name not in names:
        raise InputError(
            "only a study that is there can be resumed",
            got=f"no study {name!r}{_listed(name, names)}",
            hint="leave --resume out to start it",
        )
    if place.name is not None and not place.resume and name in names:
        raise InputError(
            "a study of that name is there already",
            got=f"study {name!r}",
            hint="go on with it by --resume, or take another --study",
        )


def _listed(name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names, n=_MOST_LISTED, cutoff=0.5) or sorted(names)
    return f"; there are {', '.join(close[:_MOST_LISTED])}" if names else "; the storage is empty"


def join_study(address: str, name: str) -> Joined:
    """A study by its name, with the question it carries. `InputError` as of `open_study`."""
    import optuna

    opened = open_storage(address)
    try:
        names = _names(opened)
        if name not in names:
            raise InputError(
                "a worker joins a study that `shardplan search` made",
                got=f"no study {name!r}{_listed(name, names)}",
                hint="start it with `shardplan search --storage URL --study NAME`",
            )
        study = optuna.load_study(study_name=name, storage=opened)
        attributes = study.user_attrs
    except InputError:
        raise
    except Exception as error:
        raise refusal(address, error) from None
    _check_version(name, attributes)
    digest, text = attributes.get("shardplan_digest"), _read(attributes)
    if digest is None or not text or "shardplan_trials" not in attributes:
        raise InputError(
            "a worker joins a study that `shardplan search` made",
            got=f"study {name!r} carries no question",
            hint="start one with `shardplan search --storage URL --study NAME`",
        )
    resolved, cards = decode(text)
    read_attribute(attributes, "shardplan_trials", int)
    engine, seed = read_attribute(attributes, "shardplan_engine", tuple[SampledEngine, int])
    study.sampler = per_trial(engine, seed)
    return Joined(study=study, resolved=resolved, cards=cards, engine=engine, digest=digest)
