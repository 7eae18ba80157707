"""Tokens predicted ahead: which depths an engine runs with a model, and what is asked of them.

`off` is depth 0; `auto` searches 0 and every depth that the engine runs with a model that ships a
prediction layer; a number is that depth alone. Nothing is predicted ahead unless it is asked for.
"""

from __future__ import annotations

from shardplan.costmodel.acceptance import default_acceptance
from shardplan.costmodel.engines import EngineProfile
from shardplan.models.errors import InputError
from shardplan.models.spec import ModelSpec
from shardplan.search.plan_request import Workload

__all__ = ["acceptance_note", "check_depth", "depths_and_workload", "most_depth", "mtp_depths"]


def most_depth(spec: ModelSpec, engine: EngineProfile) -> int:
    """Most tokens that the engine predicts ahead with this model; 0 where it predicts none."""
    known = engine.mtp_architectures
    if not spec.mtp_layers or ("any" not in known and spec.architecture not in known):
        return 0
    return engine.mtp_max


def _why_none(spec: ModelSpec, engine: EngineProfile) -> str:
    if not spec.mtp_layers:
        return f"{spec.name} ships no prediction layer"
    return f"{engine.name} predicts no tokens ahead with {spec.architecture}"


def check_depth(spec: ModelSpec, engine: EngineProfile, depth: int) -> None:
    """`InputError` where the engine does not predict `depth` tokens ahead with this model."""
    most = most_depth(spec, engine)
    if depth <= most:
        return
    rule = (
        f"{engine.name} predicts at most {most} tokens ahead" if most else _why_none(spec, engine)
    )
    raise InputError(rule, got=f"mtp={depth}, model={spec.name}", hint=f"try mtp={most}")


def mtp_depths(
    spec: ModelSpec, engine: EngineProfile, asked: str | int, notes: list[str]
) -> tuple[int, ...]:
    """The depths to search; what `auto` finds is said in a note.

    `InputError` for a word that is neither off, auto nor a whole number, and for a depth that the
    engine does not run with the model.
    """
    word = str(asked).strip().lower()
    if word == "off":
        return (0,)
    most = most_depth(spec, engine)
    if word == "auto":
        if not most:
            notes.append(f"no tokens are predicted ahead: {_why_none(spec, engine)}")
        return tuple(range(most + 1))
    if isinstance(asked, bool) or not (word.isascii() and word.isdigit()) or len(word) > 9:  # noqa: PLR2004 - digits of a small number
        raise InputError(
            "`mtp` is off, auto or the tokens to predict ahead",
            got=f"mtp={str(asked)[:40]!r}",
            hint=f"try {most or 'off'}",
        )
    check_depth(spec, engine, int(word))
    return (int(word),)


def acceptance_note(spec: ModelSpec) -> str:
    """What is assumed of tokens predicted ahead where nothing else is said."""
    found = default_acceptance(spec.architecture)
    return (
        f"mtp_acceptance was not given: {found.value:g} of the tokens predicted ahead are taken as "
        f"kept, at every position ({found.fact.kind}: {found.fact.source}); later positions are "
        "often kept less, so confirm depths above 1 with your own traffic"
    )


def depths_and_workload(
    subject: tuple[ModelSpec, EngineProfile], asked: str | int, work: Workload, notes: list[str]
) -> tuple[tuple[int, ...], Workload]:
    """Depths to search, and the workload with the acceptance that they are priced with."""
    depths = mtp_depths(*subject, asked, notes)
    if not any(depths) or work.mtp_acceptance is not None:
        return depths, work
    notes.append(acceptance_note(subject[0]))
    share = default_acceptance(subject[0].architecture).value
    return depths, work.model_copy(update={"mtp_acceptance": share})
