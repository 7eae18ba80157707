"""Nodes of one rank: operators with local sizes, collectives of onnxruntime's own domain.

`com.microsoft` AllReduce, AllGather and AllToAll act along the first dim and over all ranks of a
program (onnxruntime, collective_defs.cc); another dim is brought to the front by Transpose, and the
ranks of a group stand in the node's metadata (`shardplan.group`, numbers of all stages' ranks).
There is no ReduceScatter: AllReduce and Slice stand for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shardplan.models.errors import InputError
from shardplan.models.frontends.onnx_lib import need_onnx
from shardplan.models.onnxout.laid import Laid, Move, Placed, local_shape, shard
from shardplan.models.opgraph import Layout
from shardplan.models.redistribute import PARTIAL

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_lib import NodeProto

__all__ = ["COLLECTIVES", "GROUP", "Nodes", "group_of"]

COLLECTIVES = ("AllReduce", "AllGather", "AllToAll")
GROUP = "shardplan.group"
DOMAIN = "com.microsoft"
_REDUCED = ("float16", "float32", "float64")
_GATHERED = (*_REDUCED, "int64", "bool")


def group_of(laid: Laid, axes: Sequence[str], rank: int, stage: int) -> list[int]:
    """Ranks that one rank of a stage meets over some axes, in the order of their pieces."""
    mesh = laid.mesh
    places = list(itertools.product(*map(range, mesh.shape)))
    own = places[rank]
    stays = [index for index, axis in enumerate(mesh.axes) if axis not in axes]
    met = [r for r, place in enumerate(places) if all(place[i] == own[i] for i in stays)]
    return [stage * mesh.ranks + one for one in met]


@dataclass(slots=True, eq=False)
class Nodes:
    """Collects the nodes and the constants of one rank of one stage."""

    laid: Laid
    rank: int
    """Rank within the stage."""
    stage: int
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    """New constants: shapes, offsets."""

    def add(self, op: str, inputs: Sequence[str], out: str, domain: str = "", **attrs: Any) -> str:
        """One node, named like what it makes."""
        made = need_onnx().helper.make_node(op, list(inputs), [out], out, domain=domain, **attrs)
        self.nodes.append(made)
        return out

    def constant(self, name: str, value: Any, dtype: str = "int64") -> str:
        """A new constant."""
        self.constants[name] = np.asarray(value, dtype)
        return name

    def placed(self, step: Placed) -> None:
        """An operator; shapes that are constants are rewritten to those of the rank."""
        node = need_onnx().NodeProto()
        node.CopyFrom(self.laid.source.nodes[step.op.name])
        for slot, name in zip(self.laid.source.slots[step.op.name], step.reads, strict=True):
            node.input[slot] = name
        if step.op.kind == "embedding" and any(loop == "v" for loop in step.chosen.values()):
            self._lookup(step, node)
            return
        if node.op_type in ("Reshape", "Expand"):
            shape = self._local(step.op.writes[0].tensor, step.writes[0])
            node.input[1] = self.constant(f"{node.output[0]}/shape", shape)
        for one in node.attribute:
            if one.name in ("q_num_heads", "kv_num_heads"):
                one.i //= math.prod(
                    self.laid.mesh.size((axis,))
                    for axis, loop in step.chosen.items()
                    if loop == "h"
                )
        self.nodes.append(node)

    def moved(self, step: Move) -> None:
        """A redistribution."""
        {
            "all_reduce": self._all_reduce,
            "reduce_scatter": self._reduce_scatter,
            "all_gather": self._all_gather,
            "all_to_all": self._all_to_all,
            "slice": self._slice,
        }[step.kind](step)

    def _local(self, tensor: str, layout: Layout) -> tuple[int, ...]:
        return local_shape(self.laid.source.raw.tensors[tensor].shape, layout, self.laid.mesh)

    def _lookup(self, step: Placed, node: NodeProto) -> None:
        """Rows of other ranks give zeros: the sum over the ranks is the whole lookup."""
        table, ids = node.input
        out, ops = node.output[0], self.laid.source.raw.tensors
        axes = [axis for axis, loop in step.chosen.items() if loop == "v"]
        piece, pieces = shard(dict.fromkeys(axes, 0), 0, self.rank, self.laid.mesh)
        rows = ops[step.op.inputs[0]].shape[0]
        mine, kind = rows // pieces, ops[step.op.inputs[1]].dtype

        def number(name: str, value: int) -> str:
            return self.constant(f"{out}/{name}", value, kind)

        negative = self.add("Less", [ids, number("zero", 0)], f"{out}/negative")
        turned = self.add("Add", [ids, number("rows", rows)], f"{out}/turned")
        ids = self.add("Where", [negative, turned, ids], f"{out}/ids")
        ids = self.add("Sub", [ids, number("first", piece * mine)], f"{out}/own")
        low = self.add("GreaterOrEqual", [ids, f"{out}/zero"], f"{out}/low")
        high = self.add("Less", [ids, number("end", mine)], f"{out}/high")
        held = self.add("And", [low, high], f"{out}/held")
        safe = self.add("Where", [held, ids, f"{out}/zero"], f"{out}/safe")
        found = self.add("Gather", [table, safe], f"{out}/found", axis=0)
        last = self.constant(f"{out}/last", [-1])
        held = self.add("Unsqueeze", [held, last], f"{out}/mask")
        code = self.laid.source.walked.types[out].tensor_type.elem_type
        factor = self.add("Cast", [held], f"{out}/factor", to=code)
        self.add("Mul", [found, factor], out)

    def _collective(self, op: str, step: Move, source: str, out: str) -> str:
        dtype = self.laid.source.raw.tensors[step.tensor].dtype
        allowed = _REDUCED if op == "AllReduce" else _GATHERED
        if dtype not in allowed:
            raise InputError(
                f"{DOMAIN}.{op} takes {', '.join(allowed)}",
                got=f"tensor={step.tensor}, dtype={dtype}",
                hint="cast the model, or choose a strategy that does not move this tensor",
            )
        group = group_of(self.laid, step.axes, self.rank, self.stage)
        sized = {} if op == "AllReduce" else {"group_size": len(group)}
        sized |= {"axis": 0} if op == "AllGather" else {}
        self.add(op, [source], out, DOMAIN, **sized)
        self.nodes[-1].metadata_props.add(key=GROUP, value=",".join(map(str, group)))
        return out

    def _all_reduce(self, step: Move) -> None:
        self._collective("AllReduce", step, step.source, step.result)

    def _reduce_scatter(self, step: Move) -> None:
        whole = self._collective("AllReduce", step, step.source, f"{step.result}/sum")
        self._cut(step, whole, step.axes, step.result)

    def _slice(self, step: Move) -> None:
        self._cut(step, step.source, step.axes, step.result)

    def _cut(self, step: Move, source: str, axes: Sequence[str], out: str) -> None:
        """This rank's piece of the dim that the axes join; what already splits it is major."""
        dim = step.after[axes[0]]
        joined = {axis: d for axis, d in step.after.items() if axis in axes}
        piece, _ = shard(joined, int(dim), self.rank, self.laid.mesh)
        size = self._local(step.tensor, step.after)[int(dim)]
        bounds = [
            self.constant(f"{out}/{name}", [value])
            for name, value in (("start", piece * size), ("end", (piece + 1) * size), ("axis", dim))
        ]
        self.add("Slice", [source, *bounds], out)

    def _turn(self, source: str, order: Sequence[int], out: str) -> str:
        if list(order) == sorted(order):
            return source
        return self.add("Transpose", [source], out, perm=list(order))

    def _all_gather(self, step: Move) -> None:
        self._gather(step, step.source, int(step.before[step.axes[0]]), step.result)

    def _gather(self, step: Move, source: str, dim: int, out: str) -> None:
        rank = len(self.laid.source.raw.tensors[step.tensor].shape)
        order = [dim, *(d for d in range(rank) if d != dim)]
        if dim == 0:
            self._collective("AllGather", step, source, out)
            return
        front = self._turn(source, order, f"{out}/front")
        whole = self._collective("AllGather", step, front, f"{out}/whole")
        self._turn(whole, [order.index(d) for d in range(rank)], out)

    def _all_to_all(self, step: Move) -> None:
        """Pieces of `there` are sent, pieces of `here` received, in the order of the group."""
        pairs = {(step.before[axis], step.after[axis]) for axis in step.axes}
        if len(pairs) > 1 or PARTIAL in next(iter(pairs)):
            raise InputError(
                "axes that exchange together exchange the same dims",
                got=f"tensor={step.tensor}, axes={', '.join(step.axes)}",
                hint="give the operators around it the same axis for one dim",
            )
        here, there = (int(dim) for dim in next(iter(pairs)))
        local = self._local(step.tensor, step.before)
        ways, rank, out = self.laid.mesh.size(step.axes), len(local), step.result
        order = [there, *(d for d in range(rank) if d != there)]
        front = self._turn(step.source, order, f"{out}/front")
        sent = self._collective("AllToAll", step, front, f"{out}/sent")
        parts = [ways, local[there] // ways, *(local[d] for d in order[1:])]
        apart = self.add("Reshape", [sent, self.constant(f"{out}/parts", parts)], f"{out}/apart")
        back: list[int] = []
        for dim in range(rank):
            back += [0] if dim == here else []
            back.append(1 + order.index(dim))
        turned = self._turn(apart, back, f"{out}/turned")
        shape = self._local(step.tensor, step.after)
        self.add("Reshape", [turned, self.constant(f"{out}/shape", shape)], out)
