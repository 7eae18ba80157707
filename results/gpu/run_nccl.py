"""A plan applied and run on real GPUs: equal to the unsplit model, and how long a step takes.

    python results/gpu/run_nccl.py [--model llama-3.1-8b] [--tp 2] [--sp] [--compile]
        [--cluster hgx-h100] [--points prefill:1x2048,decode:8x1024] [--out FILE]

Needs torch and numpy besides this repository (`src` on PYTHONPATH). One process a GPU. Each makes
the same random bf16 decoder, runs it whole, exports it, cuts its own part as the plan says and
runs that over NCCL. Reported, as a Markdown table:

    error     largest over ranks of |split - float32| / |float32|, root mean square, beside that of
              the whole bf16 model; partial sums are rounded before they are added, so up to
              twice the whole model's error is allowed, else the run fails
    whole     one step of the unsplit bf16 model on one GPU, ms
    eager     one step of the rank's module, kernels launched from Python, ms
    graph     the same replayed as a CUDA graph, ms (with --compile: fused by inductor first)
    predicted what shardplan says of that step on the cluster (`predictions.json`), ms

Times are medians of 20 steps after 5 that warm up, the slowest rank's. Decode grows its caches by
concatenation, which copies them: an engine writes in place, and the prediction takes that.
`--device cpu --backend gloo` is a trial of the script itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from llama import Sizes, random_decoder

from shardplan.models.fx.emit import RankGraph, emit
from shardplan.models.fx.loops import opgraph_of
from shardplan.models.fx.modules import bind_groups, cut, group_names, process_groups, rank_module
from shardplan.models.fx.roles import decoder_program
from shardplan.models.fx.step import Exported, exported_of
from shardplan.models.opshard import Program, transfers_of
from shardplan.models.parallel import Mesh, Parallelism, make_mesh
from shardplan.models.spec import ModelSpec

HERE = Path(__file__).resolve().parent
CONFIGS = {
    "llama-1b": HERE / "llama-1b.json",
    "llama-3.1-8b": HERE.parents[1] / "models" / "presets" / "llama-3.1-8b.json",
}
WARM, SAMPLES = 5, 20
ALLOWED = 2.0
"""Error of the split model over that of the whole one, both bf16 against float32."""
Step = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a process is told."""

    model: str
    config: str
    tp: int
    sp: bool
    compiled: bool
    device: str
    backend: str
    cluster: str
    points: tuple[tuple[str, int, int], ...]
    port: int
    out: str


def spec_of(name: str, sizes: Sizes) -> ModelSpec:
    """The sizes as the plan's own code takes them."""
    return ModelSpec(
        name=name,
        architecture="LlamaForCausalLM",
        hidden=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        ffn=sizes.ffn,
        vocab=sizes.vocab,
    )


class Process:
    """One rank."""

    def __init__(self, rank: int, asked: Asked) -> None:
        self.rank, self.asked = rank, asked
        self.cuda = asked.device == "cuda"
        self.device = f"cuda:{rank}" if self.cuda else "cpu"
        self.sizes = Sizes.of(json.loads(Path(asked.config).read_text(encoding="utf-8")))
        self.par = Parallelism(tp=asked.tp, sp=asked.sp)
        spec = spec_of(asked.model, self.sizes)
        self.mesh: Mesh = make_mesh(spec, self.par)
        self.groups: dict[str, Any] = {}

    def inputs(self, batch: int, tokens: int, phase: str, dtype: torch.dtype) -> list[Any]:
        """Tokens, and for decode caches of `tokens`, the same on every rank."""
        draw = torch.Generator(device=self.device).manual_seed(7)
        new = tokens if phase == "prefill" else 1
        vocab = (0, self.sizes.vocab)
        ids = torch.randint(*vocab, (batch, new), generator=draw, device=self.device)
        if phase == "prefill":
            return [ids]
        shape = (batch, self.sizes.kv_heads, tokens, self.sizes.head_dim)
        found = [ids]
        for _ in range(2 * self.sizes.layers):
            cache = torch.randn(shape, generator=draw, device=self.device, dtype=torch.bfloat16)
            found.append(cache.to(dtype))
        return found

    def point(self, phase: str, batch: int, tokens: int) -> dict[str, Any]:
        """One row of the table."""
        exact = self.reference(phase, batch, tokens)
        alone, whole_s, exported = self.whole(phase, batch, tokens)
        start = time.perf_counter()
        graph = opgraph_of(exported)
        program = decoder_program(graph, self.mesh, self.par, phase)  # type: ignore[arg-type]
        split = emit(exported, program)
        apply_s = time.perf_counter() - start
        module, own = self.part(split, exported, self.inputs(batch, tokens, phase, torch.bfloat16))
        del exported
        self.emptied()
        with torch.no_grad():
            found = module(*own)[0].float()
            eager_s = self.timed(lambda: module(*own))
            graph_s = self.replayed(module, own)
        return {
            "phase": phase,
            "batch": batch,
            "tokens": tokens,
            "collectives": _counts(program),
            "apply_s": apply_s,
            "error_whole": _error(alone, exact),
            "error_split": self.slowest(_error(found, exact)),
            "whole_s": whole_s,
            "eager_s": self.slowest(eager_s),
            "graph_s": self.slowest(graph_s),
        }

    def whole(self, phase: str, batch: int, tokens: int) -> tuple[Any, float, Exported]:
        """(logits, seconds of a step, export) of the unsplit bf16 model."""
        model = random_decoder(self.sizes, self.device, torch.bfloat16)
        given = self.inputs(batch, tokens, phase, torch.bfloat16)
        with torch.no_grad():
            logits = model(*given)[0].float()
            seconds = self.timed(lambda: model(*given))
            exported = exported_of(torch.export.export(model, tuple(given), strict=False))
        return logits, seconds, exported

    def part(self, split: RankGraph, exported: Exported, given: list[Any]) -> tuple[Any, list[Any]]:
        """(module, inputs) of this rank."""
        names = group_names([split.graph])
        self.groups = self.groups or process_groups(names, self.mesh, 1, lambda _, rank: rank)
        module = rank_module(
            split.graph, split.held, exported.tensors, self.mesh, self.rank, device=self.device
        )
        bind_groups(module, self.groups)
        lies = split.program.inputs
        own = [
            cut(value, lies[name], self.mesh, self.rank).contiguous()
            for name, value in zip(split.inputs, given, strict=True)
        ]
        return module, own

    def reference(self, phase: str, batch: int, tokens: int) -> Any:
        """Logits in float32 of the weights that the bf16 model has."""
        model = random_decoder(self.sizes, self.device, torch.bfloat16).float()
        with torch.no_grad():
            logits = model(*self.inputs(batch, tokens, phase, torch.float32))[0]
        del model
        self.emptied()
        return logits

    def emptied(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()

    def timed(self, step: Step) -> float:
        """Median seconds of a step."""
        return statistics.median([self.once(step) for _ in range(WARM + SAMPLES)][WARM:])

    def once(self, step: Step) -> float:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3

    def replayed(self, module: Any, own: list[Any]) -> float:
        """Median seconds of the step as a CUDA graph; NaN where there are none (CPU)."""
        if self.asked.compiled:
            module = torch.compile(module, fullgraph=True, dynamic=False)
            module(*own)
        if not self.cuda:
            return self.timed(lambda: module(*own)) if self.asked.compiled else float("nan")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                module(*own)
        torch.cuda.current_stream().wait_stream(side)
        dist.barrier()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            module(*own)
        return self.timed(captured.replay)

    def slowest(self, value: float) -> float:
        """The largest of all ranks."""
        found = torch.tensor(value, device=self.device, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)


def _error(found: Any, exact: Any) -> float:
    difference = (found - exact).double().square().mean().sqrt()
    return float(difference / exact.double().square().mean().sqrt())


def _counts(program: Program) -> str:
    kinds = Counter(kind for kind, _, _ in transfers_of(program))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def run(rank: int, asked: Asked) -> None:
    """One process; the first prints."""
    torch.set_num_threads(1) if asked.device == "cpu" else torch.cuda.set_device(rank)
    dist.init_process_group(
        asked.backend,
        init_method=f"tcp://127.0.0.1:{asked.port}",
        rank=rank,
        world_size=asked.tp,
        device_id=torch.device(f"cuda:{rank}") if asked.device == "cuda" else None,
    )
    process = Process(rank, asked)
    rows = [process.point(*point) for point in asked.points]
    wrong = [row for row in rows if not row["error_split"] <= ALLOWED * row["error_whole"]]
    if rank == 0:
        text = table(asked, rows)
        print(text)
        if asked.out:
            Path(asked.out).write_text(text, encoding="utf-8")
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(f"a split step is further from float32 than allowed: {wrong}")


def predicted(asked: Asked, row: dict[str, Any]) -> str:
    """Milliseconds of a step as shardplan prices it, "" where it was not asked."""
    known = json.loads((HERE / "predictions.json").read_text(encoding="utf-8"))["rows"]
    wanted = {"model": asked.model, "cluster": asked.cluster, "tp": asked.tp}
    wanted |= {name: row[name] for name in ("phase", "batch", "tokens")}
    for one in known:
        if all(one[name] == value for name, value in wanted.items()):
            return f"{one['step_s'] * 1e3:.3f} ({one['collective_s'] * 1e3:.3f} collectives)"
    return ""


def table(asked: Asked, rows: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    name = torch.cuda.get_device_name(0) if asked.device == "cuda" else "CPU"
    way = f"tp{asked.tp}" + (" sp" if asked.sp else "") + (" compiled" if asked.compiled else "")
    titles = ("step", "collectives", "error whole", "error split")
    titles += ("whole ms", "eager ms", "graph ms", f"predicted ms, {asked.cluster}")
    lines = [
        f"{asked.model}, {way}, {asked.tp} x {name}, torch {torch.__version__}",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
    ]
    for row in rows:
        cells = [
            f"{row['phase']} {row['batch']}x{row['tokens']}",
            row["collectives"],
            f"{row['error_whole']:.2e}",
            f"{row['error_split']:.2e}",
            *(f"{row[key] * 1e3:.3f}" for key in ("whole_s", "eager_s", "graph_s")),
            predicted(asked, row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    applied = max(row["apply_s"] for row in rows)
    return "\n".join([*lines, "", f"applied to the exported graph in {applied:.2f} s at most", ""])


def points_of(text: str) -> tuple[tuple[str, int, int], ...]:
    """Points as `prefill:1x2048,decode:8x1024`."""
    found = []
    for word in text.split(","):
        phase, _, sizes = word.partition(":")
        batch, _, tokens = sizes.partition("x")
        if phase not in ("prefill", "decode") or not (batch + tokens).isdigit():
            raise SystemExit(f"a point is phase:BATCHxTOKENS (got {word!r})")
        found.append((phase, int(batch), int(tokens)))
    return tuple(found)


def main() -> None:
    """Start a process for each rank."""
    parser = argparse.ArgumentParser(description="Run a tensor-parallel plan over NCCL.")
    parser.add_argument("--model", choices=sorted(CONFIGS), default="llama-3.1-8b")
    parser.add_argument("--config", default="", help="a Hugging Face config.json in its place")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--compile", action="store_true", dest="compiled")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl")
    parser.add_argument("--cluster", default="hgx-h100")
    parser.add_argument(
        "--points", default="prefill:1x2048,prefill:4x1024,decode:8x1024,decode:32x1024"
    )
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--out", default="")
    given = vars(parser.parse_args())
    if given["config"]:
        given["model"] = Path(given["config"]).stem
    else:
        given["config"] = str(CONFIGS[given["model"]])
    asked = Asked(**{**given, "points": points_of(given["points"])})
    mp.spawn(run, args=(asked,), nprocs=asked.tp)


if __name__ == "__main__":
    main()
