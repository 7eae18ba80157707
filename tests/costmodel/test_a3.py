"""The A3 calibration: what it changes of 910b2, and the whole steps that it must give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.catalog import load_cluster, load_device
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.fitting.a3 import matmul_rows, scaled
from shardplan.costmodel.forward import forward_loads, parts_by_kind
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.surface import surface_of
from shardplan.costmodel.step import StepModel
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism

HEADER = "scenario,kernel,count,mean_us,std_us,input_shapes\n"


def _parts(phase: Phase, *, batch: int, new: int, prefix: int, sp: bool) -> tuple[float, float]:
    """(compute with its floors, collectives with waiting) of Qwen3-32B bf16 on 16 dies, seconds."""
    engine = load_engine("vllm-ascend")
    spec, par = load_model("qwen3-32b"), Parallelism(tp=16, sp=sp)
    phases: tuple[Phase, ...] = ("prefill", "decode")
    graphs = {one: apply(build_graph(spec, one), par) for one in phases}
    model = StepModel.of(graphs, load_cluster("atlas-800i-a3"), engine)
    loads = forward_loads(
        phase,
        engine,
        batch=batch,
        new=new,
        prefix=prefix,
        weight_dtype="bf16",
        kv_dtype="bf16",
        attention="flash",
    )
    parts = parts_by_kind(model, loads).values()
    collective = sum(float(one.collective_s) for one in parts)
    return sum(float(one.total_s) for one in parts) - collective, collective


def test_the_published_decode_step_is_reproduced() -> None:
    """23.1 ms = 11.4 compute + 10.5 collectives + 1.2 idle, batch 16 at 4k to 5.6k tokens."""
    compute, collective = _parts("decode", batch=16, new=1, prefix=4799, sp=False)
    assert compute == pytest.approx(11.4e-3, rel=0.08)
    assert collective == pytest.approx(10.5e-3, rel=0.05)


def test_the_published_prefill_steps_are_reproduced() -> None:
    """3 steps of 41,040 tokens and 2 of 24,624: 3,242 ms compute + 2,491 collectives."""
    long, short = (_parts("prefill", batch=b, new=4104, prefix=0, sp=True) for b in (10, 6))
    assert 3 * long[0] + 2 * short[0] == pytest.approx(3.242, rel=0.05)
    assert 3 * long[1] + 2 * short[1] == pytest.approx(2.491, rel=0.05)


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "seconds"),
    [
        (41040, 3200, 5120, "bf16", 4244.6e-6),
        (24624, 5120, 1600, "bf16", 1457.5e-6),
        (16, 3200, 5120, "bf16", 32.1e-6),
        (1, 4096, 7168, "w8a8", 32.1e-6 + 3.7e-6),
    ],
)
def test_profiled_products_are_reproduced(
    m: int, n: int, k: int, dtype: str, seconds: float
) -> None:
    """Single figures of the profiles; w8a8 with its quantization kernel."""
    time = matmul(Machine.of(load_device("a3-die")), m, n, k, dtype, weights="cold")
    assert time.total_s == pytest.approx(seconds, rel=0.1)


def test_what_a3_has_not_measured_is_derived_from_910b2() -> None:
    own, base = load_calibration("a3-die").sections, load_calibration("910b2").sections
    assert own["matmul.bf16"].kind == "fitted"
    assert own["moe.bf16"].kind == "derived"
    assert own["moe.bf16"].coefficients == base["moe.bf16"].coefficients


def test_factors_scale_and_short_products_are_shifted_at_many_rows_alone() -> None:
    base = {
        "floor_s": 1e-6,
        "hbm": 0.8,
        **{f"s_m{m}_n256_k{k}": 0.1 for m in (16, 4096) for k in (256, 8192, 16384)},
    }
    out = scaled(base, {"floor_s": 2.0, "compute": 3.0, "short_k": 0.3})
    assert out["floor_s"] == pytest.approx(2e-6)
    assert out["hbm"] == 0.8
    assert "compute" not in out
    shifted = {name: value for name, value in out.items() if value != base[name]}
    assert shifted.keys() == {"floor_s", "s_m4096_n256_k256"}
    assert out["s_m4096_n256_k256"] == pytest.approx(0.4)


def test_a_shift_of_a_surface_of_products_is_one_more_product() -> None:
    base = {"u1_m1": 0.1, "u1_n256": 1.0, "u1_k256": 1.0}
    out = scaled(base, {"short_k": 0.3})
    surface = surface_of(out)
    for m, k, expected in ((16, 256, 0.1), (4096, 256, 0.4), (4096, 8192, 0.1), (4096, 1448, 0.25)):
        places = [
            surface.coordinate(axis, np.asarray([float(size)]))
            for axis, size in enumerate((m, 512, k))
        ]
        assert surface.at(places)[0] == pytest.approx(expected, abs=1e-3)


def test_weights_in_fractals_are_read_as_the_product_they_belong_to(tmp_path: Path) -> None:
    folder = tmp_path / "ascend_ops"
    folder.mkdir()
    bf16 = 'p,MatMulV3,1,10,1,"64,5120;320,200,16,16"\np,SwiGlu,1,5,1,"64,3200"\n'
    int8 = 'p,MatMulV2,1,20,1,"5,7168;16160,7168"\np,MatMulV2,1,30,1,"8,2048;224,128,16,32"\n'
    for name, text in (("qwen3_32b_bf16", bf16), ("dsv3_w8a8", int8)):
        (folder / f"a3_insitu_kernels_{name}.csv").write_text(HEADER + text, encoding="utf-8")
    rows = matmul_rows(tmp_path, "MatMulV2", "MatMulV3")
    assert rows.n.tolist() == [3200.0, 16160.0, 7168.0]
    assert rows.k.tolist() == [5120.0, 7168.0, 2048.0]
    assert rows.seconds.tolist() == pytest.approx([10e-6, 20e-6, 30e-6])
