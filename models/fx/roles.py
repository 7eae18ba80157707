"""A plan's strategy on the graph of a Hugging Face decoder, by what its modules are called.

    q k v, q_b, kv_b      columns over tp (heads)       o          rows over tp
    gate up               columns over ffn_tp           down       rows
    experts               over ep, their width over the rest of tp
    embedding, head       vocabulary over embed_tp, head_tp
    norms, residual sums  tokens over tp where sp is on
    everything else       follows what it reads

The axes and groups are those of `shardplan.models.parallel.make_mesh`, so that what is inserted
can be held against what is priced. Sequences are split over dp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardplan.models.errors import InputError, LayoutError
from shardplan.models.graph import Phase
from shardplan.models.modules import module_is_whole
from shardplan.models.opgraph import Layout, Operator, OpGraph
from shardplan.models.opshard import Program, place
from shardplan.models.parallel import Mesh, Parallelism

__all__ = ["check_split", "decoder_program"]

_COLUMNS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj")
_LATENT = ("q_a_proj", "kv_a_proj_with_mqa", "q_a_layernorm", "kv_a_layernorm")


@dataclass(slots=True)
class _Roles:
    graph: OpGraph
    mesh: Mesh
    par: Parallelism
    phase: Phase

    @property
    def token(self) -> int:
        """The dim of [batch, tokens, hidden] that sp splits."""
        return 1 if self.phase == "prefill" else 0

    def strategy(self) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
        """(strategy, exchanged experts)."""
        found: dict[str, dict[str, str]] = {}
        sent: dict[str, dict[str, str]] = {}
        for op in self.graph.operators:
            chosen = self.chosen(op)
            if chosen is not None:
                found[op.name] = chosen
            if op.kind == "moe" and self.exchanges:
                sent[op.name] = dict.fromkeys(self.mesh.groups["ep"], op.reads[2].loops[0])
        return found, sent

    @property
    def exchanges(self) -> bool:
        """Whether tokens are sent to the ranks of their experts."""
        return self.par.exchange == "alltoall" and self.par.ep > 1

    def chosen(self, op: Operator) -> dict[str, str] | None:
        """The strategy of one operator; None where it follows what it reads."""
        path = op.where.split(".")
        if op.kind == "embedding":
            table, ids = op.reads
            return self.of("embed", table.loops[0], ids.loops)
        if op.kind == "moe":
            return self.experts(op)
        if op.kind == "matmul" and len(op.reads) > 1:
            return self.product(op, path)
        if (self.is_norm(path) or path[-1].isdigit()) and len(op.writes[0].loops) > 1:
            return self.tokens(op.writes[0].loops)
        return None

    @staticmethod
    def is_norm(path: list[str]) -> bool:
        """Whether an operator is part of a norm of the hidden state."""
        return "norm" in path[-1] and "self_attn" not in path

    def product(self, op: Operator, path: list[str]) -> dict[str, str] | None:
        """A linear product by the name of its module."""
        name = path[-1]
        x, (column, row) = op.reads[0].loops, op.reads[1].loops[:2]
        tp = self.mesh.groups["tp"]
        if name == "lm_head":
            whole = module_is_whole(self.par, "head")
            return self.sequences(x) if whole else self.of("head", column, x)
        if name in _COLUMNS:
            return {**self.sequences(x), **dict.fromkeys(tp, column)}
        if name == "o_proj":
            return self.output(row, x)
        if name in _LATENT:
            return self.sequences(x)
        if name == "router":
            return self.tokens(x)
        if name in ("gate_proj", "up_proj", "down_proj"):
            module = "shared" if any(part.startswith("shared") for part in path) else "ffn"
            return self.of(module, row if name == "down_proj" else column, x)
        return None

    def of(self, module: str, loop: str, x: tuple[str, ...]) -> dict[str, str]:
        """A product split over its module's ranks; held whole, it takes tokens as they lie."""
        if module_is_whole(self.par, module):
            home = self.exchanges and module == "shared"
            return self.home(x) if home else self.tokens(x)
        own = self.mesh.groups[module]
        return {**self.sequences(x), **dict.fromkeys(own, loop)}

    def output(self, row: str, x: tuple[str, ...]) -> dict[str, str]:
        """The output projection of attention."""
        if module_is_whole(self.par, "o"):
            return self.tokens(x)
        if self.mesh.groups["oD"]:
            raise LayoutError(
                "an export splits the output projection by whole heads",
                got=f"o_tp={self.par.o_tp}, tp={self.par.tp}",
                hint="use o_tp=0",
            )
        own = self.mesh.groups["tp"] + self.mesh.groups["oK"]
        return {**self.sequences(x), **dict.fromkeys(own, row)}

    def sequences(self, x: tuple[str, ...]) -> dict[str, str]:
        """Sequences over dp."""
        return dict.fromkeys(self.mesh.groups["dp"], x[0]) if x[0] else {}

    def tokens(self, x: tuple[str, ...]) -> dict[str, str]:
        """Sequences over dp, and tokens over tp where sp is on."""
        split = self.mesh.groups["tp"] if self.par.sp and x[self.token] else ()
        return {**self.sequences(x), **dict.fromkeys(split, x[self.token])}

    def home(self, x: tuple[str, ...]) -> dict[str, str]:
        """Tokens on the ranks that send them."""
        return {**self.sequences(x), **dict.fromkeys(self.mesh.groups["tpe"], x[self.token])}

    def experts(self, op: Operator) -> dict[str, str]:
        """Experts over ep and their width over the rest of tp; x stands first, weights later."""
        x, (expert, width) = op.reads[0].loops, op.reads[2].loops[:2]
        inner = dict.fromkeys(self.mesh.groups["tpf"], width)
        if self.exchanges:
            return {**self.home(x), **inner}
        return {**self.sequences(x), **dict.fromkeys(self.mesh.groups["ep"], expert), **inner}


def check_split(par: Parallelism) -> None:
    """`InputError` for what graphs of PyTorch are not split by."""
    if par.cp > 1 or par.mtp:
        raise InputError(
            "graphs of PyTorch are split over tp, sp, pp, dp, ep and modules",
            got=f"cp={par.cp}, mtp={par.mtp}",
            hint="prove contexts and predicted tokens with --level 1",
        )


def decoder_program(graph: OpGraph, mesh: Mesh, par: Parallelism, phase: Phase) -> Program:
    """The program of a step as `shardplan.models.fx.decoders` exports it.

    Inputs are ids, then caches; outputs logits, then caches. Sequences lie over dp, caches over
    tp by their heads. Raises `InputError` for what no export is split by (cp, mtp).
    """
    check_split(par)
    strategy, exchanged = _Roles(graph, mesh, par, phase).strategy()
    data = dict.fromkeys(mesh.groups["dp"], 0)
    heads: Layout = {**data, **dict.fromkeys(mesh.groups["tp"], 1)}

    def cache(name: str) -> Layout:
        """Over tp by heads; the latent of MLA has none and lies whole on each rank."""
        return heads if graph.tensors[name].shape[1] % par.tp == 0 else data

    given = [name for name, one in graph.tensors.items() if one.kind in ("input", "state")]
    inputs = {name: data if i == 0 else cache(name) for i, name in enumerate(given)}
    logits, *kept = graph.outputs
    ends: Mapping[str, Layout] = {logits: data, **{name: cache(name) for name in kept}}
    through: dict[str, Layout] = {}
    if mesh.groups["head+"]:
        through[logits] = {**data, **dict.fromkeys(mesh.groups["head+"], 2)}
    return place(
        graph, strategy, mesh, inputs=inputs, outputs=ends, through=through, exchanged=exchanged
    )
