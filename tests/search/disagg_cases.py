"""Small questions of disaggregated search for its oracle."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from tests.search.oracle import dense, specs

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.disagg import link_between
from shardplan.costmodel.engines import load_engine
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.disagg_space import Pool, Role, instance_layouts
from shardplan.search.layouts import Reach
from shardplan.search.plan import Limits, Workload
from shardplan.search.rulebook import Subject
from shardplan.search.space import Choice

__all__ = ["disagg_cases", "order_case"]

_CHOICES = (
    Choice(attention="flash", weight_dtype="bf16", kv_dtype="bf16"),
    Choice(attention="flash", weight_dtype="w8a8", kv_dtype="bf16"),
)


def _as_role(pool: Pool, role: Role) -> Pool:
    """The same for the other role: its own layouts."""
    subject = pool.subject(Parallelism())
    return Pool.of(
        role,
        subject,
        cards=pool.cards,
        sizes=pool.sizes,
        choices=pool.choices,
        grid=pool.grid,
        workload=pool.workload,
        reach=pool.reach,
    )


def _pool(
    spec: ModelSpec,
    machine: str,
    engine_name: str,
    cards: int,
    memory: float,
    sizes: int,
    reach: Reach,
) -> Pool:
    """A pool of decode instances of small cards; the caller sets role, grid and workload."""
    cluster = load_cluster(machine, cards=cards)
    cluster = replace(cluster, device=replace(cluster.device, hbm_bytes=memory))
    engine = load_engine(engine_name)
    engine = replace(
        engine,
        reserve_bytes=2.0**20,
        communicator_bytes=2.0**18,
        mtp_max=2,
        mtp_architectures=("any",),
    )
    return Pool.of(
        "decode",
        Subject(spec=spec, cluster=cluster, engine=engine, parallel=Parallelism()),
        cards=cards,
        sizes=tuple(size for size in (1, 2, 4) if size <= sizes),
        choices=_CHOICES,
        grid=(1, 3, 8, 32),
        workload=Workload(input_len=1, output_len=1),
        reach=reach,
    )


@st.composite
def disagg_cases(draw: st.DrawFn) -> DisaggQuestion:
    """A small question over shared or separate pools whose limits bind about as often as not."""
    spec = replace(draw(specs()), mtp_layers=draw(st.sampled_from([0, 1])))
    asked: list[tuple[int, ...]] = [(0,), (0, 1), (0, 1, 2), (2,)]
    depths = draw(st.sampled_from(asked)) if spec.mtp_layers else (0,)
    shared = draw(st.booleans())
    engine = draw(st.sampled_from(["vllm-ascend", "vllm-ascend", "torch-graph"]))
    contexts: list[tuple[int, ...] | None] = [(1,), (1,), None, (2,)]
    reach = Reach(
        depths=depths,
        contexts=draw(st.sampled_from(contexts)),
        modules=engine == "torch-graph" and draw(st.booleans()),
        ways=draw(st.booleans()),
    )
    if reach.ways:
        spec = replace(spec, layers=min(spec.layers, 5))
    memory = draw(st.sampled_from([16e6, 64e6, 1e9]))
    cards = (
        draw(st.sampled_from([2, 3, 4])) if spec.moe is None else draw(st.sampled_from([3, 3, 4]))
    )
    workload = Workload(
        input_len=draw(st.sampled_from([16, 300, 2000])),
        output_len=draw(st.sampled_from([1, 2, 64])),
        concurrency=draw(st.sampled_from([None, None, 1, 12, 200])),
        request_rate=draw(st.sampled_from([None, None, None, 5.0, 100.0])),
        prefix_hit=draw(st.sampled_from([0.0, 0.5])),
        mtp_acceptance=draw(st.sampled_from([0.0, 0.7, 1.0])),
    )
    sizes = cards - 1 if shared else cards
    machine = draw(st.sampled_from(["atlas-800t-a2", "atlas-800i-a3"]))
    decode = _pool(spec, machine, engine, cards, memory, sizes, reach)
    if shared:
        prefill = decode
    else:
        own = draw(st.sampled_from([1, 2]))
        prefill = _pool(spec, "atlas-800i-a3", engine, own, 1e9, own, reach)
    grid = (100, 512, 4096)
    one, other = (
        pool.cluster if shared else load_cluster(pool.cluster.name, nodes=2)
        for pool in (prefill, decode)
    )
    return DisaggQuestion(
        prefill=replace(_as_role(prefill, "prefill"), grid=grid, workload=workload),
        decode=replace(decode, workload=workload),
        shared=shared,
        link=link_between(one, other, cards, same=shared),
        limits=Limits(
            ttft_s=draw(st.sampled_from([None, None, 0.05, 0.5])),
            tpot_s=draw(st.sampled_from([None, None, 0.005, 0.02])),
            ttft_p99_s=draw(st.sampled_from([None, None, 0.05, 0.5])),
            tpot_p99_s=draw(st.sampled_from([None, None, 0.02])),
        ),
        objective=draw(st.sampled_from(["throughput", "throughput", "latency", "cards"])),
    )


def order_case(engine: str) -> DisaggQuestion:
    """Four dies an instance, two of them on a link far faster than the rest, caches far wider than
    the hidden state: contexts want the fast link, which the engines' own order gives to tp."""
    spec = dense(hidden=64, heads=8, kv_heads=8, head_dim=256, ffn=64, layers=1)
    reach = Reach(contexts=(2,))
    pool = _pool(spec, "atlas-800i-a3", engine, 4, 1e9, 4, reach)
    near, far = pool.cluster.tiers
    slow = replace(far, bytes_per_s=1e9, link_bytes_per_s=1e9, latency_s=0.0)
    pool = replace(pool, cluster=replace(pool.cluster, tiers=(near, slow)), sizes=(4,))
    workload = Workload(input_len=2000, output_len=2)
    ends = load_cluster("atlas-800i-a3", nodes=2)
    subject = pool.subject(Parallelism())
    pool = replace(
        pool,
        workload=workload,
        layouts=tuple(instance_layouts(replace(subject, role="decode"), 4, reach)),
    )
    return DisaggQuestion(
        prefill=replace(_as_role(pool, "prefill"), grid=(4096,)),
        decode=pool,
        shared=False,
        link=link_between(ends, ends, 4, same=False),
        limits=Limits(),
        objective="latency",
    )
