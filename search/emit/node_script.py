"""The start script of one node, and the files around those of all nodes, for vLLM and SGLang.

serve_node<i>.sh   environment, then the node's server in the shell's place; several run side by
                   side, and the first to end ends all
balancer.conf      where there are several servers
quantize.sh, bench.sh
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardplan.search.emit.modelslim import quantize_script
from shardplan.search.emit.serving_page import bench
from shardplan.search.emit.vllm_layout import Launch, Split
from shardplan.search.emit.vllm_readme import balancer, url_of
from shardplan.search.emit.vllm_schemes import Checkpoint
from shardplan.search.plan import Plan

__all__ = ["node_addresses", "node_script", "server_files"]


def server_files(
    plan: Plan,
    checkpoint: Checkpoint,
    split: Split,
    todo: Sequence[Launch],
    *,
    port: int,
    script: Callable[[list[Launch]], str],
) -> dict[str, str]:
    """Texts by file name, all but the README. `port`: of the first server of a node; `script`: the
    script of one node's launches.
    """
    made = {
        f"serve_node{node}.sh": script([one for one in todo if one.slot.node == node])
        for node in sorted({one.slot.node for one in todo})
    }
    alone = split.servers == 1
    if not alone:
        made["balancer.conf"] = balancer(todo, port)
    made |= quantize_script(plan)
    made["bench.sh"] = bench(
        plan, checkpoint.shell, url=url_of(port) if alone else "", servers=split.servers
    )
    return made


def node_script(
    checkpoint: Checkpoint, settings: Sequence[str], here: Sequence[Launch], commands: Sequence[str]
) -> str:
    """The script: `commands` of the launches `here`, after the lines of `settings`.

    Further arguments of the script go to every command.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# Serves the plan's model on one node; README.md says in which order to start the nodes.",
        "set -euo pipefail",
        *checkpoint.shell,
        'case "$MODEL" in -*) echo "MODEL must not begin with a dash" >&2; exit 2 ;; esac',
        *settings,
        "",
    ]
    visible = [",".join(str(device) for device in one.slot.devices) for one in here]
    whole = [command + ' \\\n  "$@"' for command in commands]
    if len(whole) == 1:
        lines += [f"export ASCEND_RT_VISIBLE_DEVICES={visible[0]}", f"exec {whole[0]}"]
    else:
        lines.append("trap 'kill $(jobs -p) 2>/dev/null || true' EXIT")
        for devices, command in zip(visible, whole, strict=True):
            lines.append(f"ASCEND_RT_VISIBLE_DEVICES={devices} {command} &")
        lines.append("wait -n  # the first server to end ends all, so that none is missed")
    return "\n".join(lines) + "\n"


def node_addresses(here: Sequence[Launch], exports: Sequence[str]) -> list[str]:
    """Addresses that a server of several nodes must be told, and the lines that hand them on."""
    if here[0].nodes == 1:
        return []
    return [
        f': "${{HEAD_ADDRESS:?set HEAD_ADDRESS to the IP address of node {here[0].head}}}"',
        ': "${NODE_ADDRESS:?set NODE_ADDRESS to the IP address of this node}"',
        ': "${NIC:?set NIC to the network interface that has NODE_ADDRESS}"',
        *exports,
    ]
