"""What the folders of prefill and decode pools hold alike, whichever engine starts them.

    serve_<role>_node<i>.sh   the instances of a role on node i
    quantize.sh, bench.sh     as of every serving target

A proxy or router is told the nodes' addresses by variables that list them, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from shardplan.search.emit.common import printable
from shardplan.search.emit.modelslim import quantize_script, quantize_steps
from shardplan.search.emit.pools import ROLES, Side, shares_cards
from shardplan.search.emit.serving_page import bench
from shardplan.search.emit.vllm_layout import Launch
from shardplan.search.plan import Plan

__all__ = [
    "address_lines",
    "address_list",
    "address_lists",
    "checkpoint_steps",
    "front_settings",
    "pool_shapes",
    "side_files",
    "start_steps",
]

_AnySide = TypeVar("_AnySide", bound=Side)


def address_list(plan: Plan, role: str) -> str:
    """Shell variable that lists the addresses of a pool's nodes."""
    return "NODE_ADDRESSES" if shares_cards(plan) else f"{role.upper()}_NODE_ADDRESSES"


def address_lists(plan: Plan) -> list[str]:
    """The variables of all pools, each once."""
    return list(dict.fromkeys(address_list(plan, role) for role in ROLES))


def address_lines(plan: Plan) -> list[str]:
    """Script lines that ask for these variables and make an array `<variable>_LIST` of each."""
    return [
        line
        for name in address_lists(plan)
        for line in (
            f': "${{{name}:?set {name} to the IP addresses of the nodes, in their order}}"',
            f'read -r -a {name}_LIST <<< "${name}"',
        )
    ]


def front_settings(plan: Plan) -> str:
    """What stands before the command that starts a proxy or router."""
    return " ".join(f'{name}="IP IP ..."' for name in address_lists(plan))


def pool_shapes(plan: Plan) -> list[str]:
    """The pools as lines of a list."""
    return [
        f"- {pool.instances} {pool.role} instance(s) on {printable(pool.cluster.title)}: "
        f"{printable(pool.strategy.parallelism().describe())}"
        for pool in plan.pools
    ]


def side_files(
    sides: Sequence[_AnySide], script: Callable[[_AnySide, list[Launch]], str]
) -> dict[str, str]:
    """Texts by file name, all but the README and what stands before the instances.

    `script`: the script of what runs of a side on one node.
    """
    decode = sides[-1]
    return {
        **{
            f"serve_{side.pool.role}_node{node}.sh": script(side, side.on(node))
            for side in sides
            for node in side.nodes
        },
        **quantize_script(decode.plan),
        "bench.sh": bench(
            decode.plan,
            decode.checkpoint.shell,
            servers=sum(side.pool.instances for side in sides),
        ),
    }


def checkpoint_steps(sides: Sequence[Side], engine: str) -> list[str]:
    """The first steps of a README: where the checkpoint lies and how it may be made."""
    needs = dict.fromkeys(need for side in sides for need in side.checkpoint.needs)
    return [
        f"Put the checkpoint on every node at one path (or let {engine} download it). It holds: "
        + "; ".join(needs)
        + ".",
        *quantize_steps(sides[-1].plan),
    ]


def start_steps(plan: Plan, sides: Iterable[Side], settings: str) -> list[str]:
    """The step of each node. `settings` stand before the command of each."""
    steps = []
    for side in sides:
        told = settings
        several = any(one.nodes > 1 for one in side.launches)
        if several:
            told += "HEAD_ADDRESS=IP NODE_ADDRESS=IP NIC=INTERFACE "
        where = "node" if shares_cards(plan) else f"{side.pool.role} node"
        for node in side.nodes:
            head = f" (HEAD_ADDRESS: node {side.on(node)[0].head})" if several else ""
            steps.append(f"On {where} {node}: `{told}./serve_{side.pool.role}_node{node}.sh`{head}")
    return steps
