"""What targets that start vLLM in containers share: pods, their scripts, words of options.

A pod is one node's part of one server. Inside it devices count from 0, whatever they are on the
node: the device plugin and Docker hand over some, and the driver numbers what it sees.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardplan.models.errors import InputError
from shardplan.search.emit.common import Slot, model_name, printable, refuse, table
from shardplan.search.emit.vllm_ascend import checked_family, script
from shardplan.search.emit.vllm_disagg import VllmSide, pool_script, sides_of
from shardplan.search.emit.vllm_layout import Launch, Split, launches, split_servers
from shardplan.search.emit.vllm_schemes import Checkpoint, checkpoint_of
from shardplan.search.plan import Plan

__all__ = ["Servers", "app_name", "image_of", "in_pod", "on_host", "servers_of", "word"]

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._/:@-]{0,254}")
_MAX_APP = 40
"""Characters of a model's name in the names of objects, which have 63 with what is added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Servers of one kind: all of an aggregated plan, or those of one pool."""

    role: str
    """`server`, `prefill` or `decode`."""
    plan: Plan
    """Of one server."""
    family: str
    checkpoint: Checkpoint
    split: Split
    launches: tuple[Launch, ...]
    side: VllmSide | None
    """Of a pool."""
    whole: Plan
    """The deployment's plan."""

    @property
    def count(self) -> int:
        """How many servers."""
        return len({one.server for one in self.launches})

    def of(self, server: int) -> tuple[Launch, ...]:
        """Launches of one server, the head first."""
        mine = [one for one in self.launches if one.server == server]
        return tuple(sorted(mine, key=lambda one: one.index))

    def text(self, one: Launch) -> str:
        """Script of a launch."""
        if self.side is not None:
            return pool_script(self.whole, self.side, [one])
        return script(self.plan, self.family, self.checkpoint, self.split, [one])


def servers_of(plan: Plan) -> list[Servers]:
    """The kinds of servers of a plan. `InputError` for a plan that vLLM on Ascend cannot run."""
    if plan.pools:
        return [
            Servers(
                role=side.pool.role,
                plan=side.plan,
                family=side.family,
                checkpoint=side.checkpoint,
                split=side.split,
                launches=side.launches,
                side=side,
                whole=plan,
            )
            for side in sides_of(plan)
        ]
    family = checked_family(plan)
    split = split_servers(plan)
    return [
        Servers(
            role="server",
            plan=plan,
            family=family,
            checkpoint=checkpoint_of(plan, family),
            split=split,
            launches=launches(plan, split),
            side=None,
            whole=plan,
        )
    ]


def in_pod(one: Launch) -> Launch:
    """The launch as its pod sees it: alone on a node of its own, devices from 0."""
    return replace(
        one,
        slot=Slot(node=one.index, first=0, ranks=one.slot.ranks),
        head=0,
        port_offset=0,
    )


def on_host(one: Launch) -> Launch:
    """The launch as a container on its host's network sees it: devices from 0, own ports."""
    return replace(one, slot=replace(one.slot, listed=tuple(range(one.slot.ranks))))


def app_name(plan: Plan) -> str:
    """The model's name as a DNS label, at most 40 characters."""
    name = re.sub(r"[^a-z0-9-]+", "-", model_name(plan).lower()).strip("-")[:_MAX_APP].strip("-")
    return name or "model"


def word(target: str, option: str, text: str) -> str:
    """An option that names an object. `InputError` unless it is a DNS label."""
    if not _NAME.fullmatch(text):
        raise InputError(
            f"{option} of {target} is lower-case letters, digits and dashes, at most 63",
            got=repr(text[:100]),
            hint=f"for example {option}=llm",
        )
    return text


def image_of(target: str, kinds: Sequence[Servers], image: str) -> str:
    """The engine's image. `InputError` for text that names none, or a device without one."""
    if image:
        if not _IMAGE.fullmatch(image):
            raise InputError(
                f"image of {target} is a name of letters, digits and ._/:@-",
                got=repr(image[:100]),
                hint="for example image=registry.local/vllm-ascend:v0.23.0",
            )
        return image
    family = kinds[0].family
    found: str | None = table("containers")["images"].get(family)
    if found is None:
        raise refuse(
            target,
            "there is no published image for this device",
            got=f"device={printable(kinds[0].plan.cluster.device)}",
            hint="name one with --option image=NAME",
        )
    return found
