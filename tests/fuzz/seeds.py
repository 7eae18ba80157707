"""Valid examples of every kind of file that shardplan reads, small enough to be read thousands of
times."""

from __future__ import annotations

import contextlib
import gzip
import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.costmodel.test_cluster_files import DATAFLOW, OPEN_SOURCE
from tests.search.emit_cases import CLUSTERS, emit_plan, moe
from tests.search.plan_factory import make_plan, make_trials
from tests.search.shared_study import search_small

from shardplan.costmodel.profiler_files.measurement import ReadOptions
from shardplan.search.calibrate import calibrate_device
from shardplan.search.study import Place
from shardplan.search.trials import write_trials

ROOT = Path(__file__).resolve().parents[2]
_SAMPLES = ROOT / "tests" / "costmodel" / "profiler_samples"
_LINT = ROOT / "tests" / "search" / "lint_samples"
_MOST_ROWS = 12
STUDY = "s"
"""Name of the study that a storage holds."""

WORKLOAD = """\
input_len = 512
output_len = {mean = 128, sigma = 0.5, max = 1024}
rate = 2.0
burstiness = 0.5
num_prompts = 40
prefix_groups = 4
prefix_len = 256
prefix_hit = 0.25
mtp_acceptance = 0.7
seed = 1
ttft_ms = 2000
tpot_ms = 50
"""
SEARCHED = """\
input_len = 512
output_len = 128
concurrency = 16
prefix_hit = 0.5
ttft_ms = 2000
tpot_ms = 50
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:04.0781490,110,27
"""
MOONCAKE = """\
{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1, 2, 3]}
{"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14, 15]}
{"timestamp": 3000, "input_length": 7237, "output_length": 794}
"""
POINTS = """\
model,cluster,nodes,engine_profile,weight_dtype,kv_dtype,attention,tp,pp,dp,ep,cp,phase,batch,tokens
llama-3.1-8b,atlas-800t-a2,1,vllm-ascend,bf16,bf16,flash,8,1,1,1,1,decode,32,4096
llama-3.1-8b,atlas-800t-a2,1,mindie,w8a8,int8,naive,4,2,1,1,1,prefill,1,2048
qwen3-30b-a3b,atlas-800i-a2,1,,,,,4,1,2,8,1,decode,16,1024
"""
SERVED = """\
model,cluster,tp,phase,input_len,output_len,concurrency,request_rate,num_prompts,prefix_hit,max_num_seqs,max_num_batched_tokens
llama-3.1-8b,atlas-800t-a2,8,serve,512,128,16,,64,0.5,256,8192
llama-3.1-8b,atlas-800i-a2,4,serve,512,128,,2.5,64,0,64,4096
"""
OPERATORS = """\
device,cluster,phase,op,m,n,k,dtype,batch,tokens,heads,kv_heads,head_dim,hidden,ffn,experts,topk,ep,ranks,message_bytes
910b2,,op,matmul,128,4096,4096,bf16,,,,,,,,,,,,
910b2,,op,attention_decode,,,,,8,2048,32,8,128,,,,,,,
910b2,,op,mla_decode,,,,,8,2048,128,,,,,,,,,
910b2,,op,moe,,,,,,64,,,,2048,768,128,8,1,,
,atlas-800t-a2,op,all_reduce,,,,,,,,,,,,,,,8,1048576
"""
MEASURED = """\
model,cluster,tp,phase,batch,tokens,measured_s,group,held_out,source,note
llama-3.1-8b,atlas-800t-a2,8,decode,32,4096,0.01,mine,true,a log,
llama-3.1-8b,atlas-800t-a2,8,prefill,1,2048,0.05,mine,false,a log,x
"""
COMMANDS = (
    "estimate --model llama-3.1-8b --cluster atlas-800t-a2 --tp 4 --phase decode --batch 8 --json",
    "estimate --op matmul --device 910b2 --m 16 --n 4096 --k 4096 --dtype bf16",
    "estimate --model qwen3-30b-a3b --cluster atlas-800i-a2 --tp 2 --dp 2 --ep 4 --phase serve "
    "--input-len 512 --output-len 64 --concurrency 8 --weight-dtype w8a8,experts=w4a8",
    "verify --model llama-3.1-8b --tp 4 --pp 2 --level 0 --stage-layers 16,16 --json",
    "search --model llama-3.1-8b --cluster atlas-300i-duo --cards 2 --input-len 256 "
    "--output-len 64 --concurrency 4 --ttft-ms 5000 --tpot-ms 100 --json",
    "search --model qwen3-0.6b --cluster atlas-800t-a2 --cards 1 --engine tpe --trials 4 --seed 1 "
    "--seed-trials 2 --objective latency --kv-dtype int8 --weight-dtype auto --attention flash",
    "search --model qwen3-0.6b --cluster atlas-800t-a2 --cards 1 --explain-space --json",
    "search --model qwen3-0.6b --cluster atlas-800t-a2 --cards 1 --cp off --mtp off "
    "--module-tp off --time-limit 2 --top 1 --rate 1.5 --collectives auto --weight-prefetch on",
    "lint 'vllm serve llama-3.1-8b -tp 4 --max-num-seqs 64' --cluster atlas-800t-a2 --no-best",
    "simulate --describe --rate 2 --num-prompts 20 --input-len 128 --output-len 16 --seed 3 --json",
    "calibrate --device 910b2 --anchor model=llama-3.1-8b,cluster=atlas-800t-a2,tp=8,phase=decode,"
    "batch=8,tokens=1024,step_ms=9 --json",
    "models llama-3.1-8b --json",
    "devices 910b2",
    "clusters atlas-800t-a2 --json",
    "analyze none.csv --json",
    "validate --group matmul --device 910b2",
    "explain plan.json --no-shadows --against tp=8,pp=2",
    "emit plan.json --target atc --out deploy --option door=shards",
    "trace plan.json --out trace.json --ranks 0,4-7",
    "analyze a.csv b.csv --against c.csv --tolerance 1",
    "search --model model.onnx --cluster atlas-800t-a2 --cards 2 --json",
    "--show-completion bash",
    "--version",
)


def _files(folder: str, pattern: str) -> Iterator[bytes]:
    for path in sorted((ROOT / folder).glob(pattern)):
        yield path.read_bytes()


def _first_rows(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:_MOST_ROWS])


def configs() -> list[bytes]:
    """Hugging Face configurations: the presets."""
    return list(_files("models/presets", "*.json"))


def devices() -> list[bytes]:
    """Devices that ship."""
    return list(_files("costmodel/data/devices", "*.toml"))


def clusters() -> list[bytes]:
    """Clusters that ship."""
    return list(_files("costmodel/data/clusters", "*.toml"))


def engines() -> list[bytes]:
    """Engine profiles that ship."""
    return list(_files("costmodel/data/engines", "*.toml"))


def workloads() -> list[bytes]:
    """Workloads of `search` and of `simulate`."""
    return [WORKLOAD.encode(), SEARCHED.encode(), b'trace = "none.csv"\nrate = 2\n']


def profiles() -> list[bytes]:
    """A device profile that `calibrate` writes."""
    found = calibrate_device([_SAMPLES / "kernel_details.csv"], "910b2", options=_said())
    return [found.text.encode()]


def _said() -> ReadOptions:
    return ReadOptions(ranks=8, context=1024)


def cluster_files() -> list[bytes]:
    """Cluster files of CANN and HCCL as JSON that is strict, and as published."""
    table = {
        "version": "1.0",
        "server_count": "1",
        "status": "completed",
        "server_list": [
            {
                "server_id": "10.0.0.1",
                "device": [
                    {"device_id": str(i), "device_ip": f"10.1.0.{i}", "rank_id": str(i)}
                    for i in range(8)
                ],
            }
        ],
    }
    nodes = [
        {"node_id": n, "node_type": "X", "item_list": [{"item_id": i} for i in range(8)]}
        for n in range(2)
    ]
    numa = {"cluster": [{"cluster_nodes": nodes}], "item_def": [{"item_type": "Ascend910B2"}]}
    made = [json.dumps(one).encode() for one in (table, numa)]
    return [*made, DATAFLOW.encode(), OPEN_SOURCE.encode()]


def traces() -> list[bytes]:
    """Azure's traces."""
    seconds = "TIMESTAMP,ContextTokens,GeneratedTokens\n0,100,20\n0.5,200,10\n7e2,3,4\n"
    return [AZURE.encode(), seconds.encode()]


def mooncake() -> list[bytes]:
    """Mooncake's traces."""
    return [MOONCAKE.encode()]


def packed_traces() -> list[bytes]:
    """Azure's traces as gzip."""
    return [gzip.compress(one, mtime=0) for one in traces()]


def kernel_tables() -> list[bytes]:
    """CSVs of profilers, and of `shardplan profile`."""
    return [_SAMPLES.joinpath(name).read_bytes() for name in _TABLES]


_TABLES = (
    "kernel_details.csv",
    "kernel_details_block_num.csv",
    "op_summary_20260101.csv",
    "ops.csv",
)


def communications() -> list[bytes]:
    """communication.json of a profiler."""
    return [(_SAMPLES / "communication.json").read_bytes()]


def logs() -> list[bytes]:
    """Logs of hccl_test."""
    return [(_SAMPLES / "all_reduce_8.log").read_bytes()]


def plans() -> list[bytes]:
    """Plans of several targets and models; those of results/ without their long lists."""
    made = [emit_plan(tp=2), make_plan(), emit_plan(tp=4, dp=8, ep=32, model=moe())]
    made += [emit_plan(soc=soc) for soc in CLUSTERS]
    found = [plan.dumps().encode() for plan in made]
    for path in sorted((ROOT / "results" / "plans").glob("*/plan.json")):
        data = json.loads(path.read_bytes())
        for name in ("pareto", "alternatives", "quantization", "switches"):
            data[name] = data.get(name, [])[:1]
        found.append(json.dumps(data).encode())
    return found


def points() -> list[bytes]:
    """Points of steps, of serving and of operators."""
    return [text.encode() for text in (POINTS, SERVED, OPERATORS)]


def figures() -> list[bytes]:
    """Tables of `validate`: a small one, the first rows of each that ships."""
    shipped = [_first_rows(one) for one in _files("costmodel/data/validation", "*.csv")]
    return [MEASURED.encode(), *shipped]


def trials() -> list[bytes]:
    """Trial tables."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trials.csv"
        write_trials(path, make_trials().head(_MOST_ROWS))
        made = path.read_bytes()
    return [made, *map(_first_rows, _files("results/plans", "*/trials.csv"))]


def parquet_trials() -> list[bytes]:
    """Trial tables as Parquet: by pandas, and as a search writes them."""
    from shardplan.search.parquet_out import write_table

    def frame(path: Path) -> None:
        make_trials().head(_MOST_ROWS).to_parquet(path, index=False)

    def ours(path: Path) -> None:
        write_table(path, trials()[0].decode())

    return [_saved(save, "trials.parquet") for save in (frame, ours)]


def journals() -> list[bytes]:
    """A journal of Optuna's with a study of three trials."""
    return [_saved(lambda path: _study(f"journal:{path}"), "study.log")]


def databases() -> list[bytes]:
    """The same as an SQLite file, of small pages: it is whole within what an input may have."""

    def save(path: Path) -> None:
        _study(f"sqlite:///{path}.large")
        with contextlib.closing(sqlite3.connect(f"{path}.large")) as held:
            held.execute("PRAGMA page_size=512")
            held.execute("VACUUM INTO ?", (str(path),))

    return [_saved(save, "study.db")]


def _study(address: str) -> None:
    search_small(Place(storage=address, name=STUDY), 3)


def grids() -> list[bytes]:
    """Grids of `profile`."""
    return list(_files("search/profiling", "grid_*.toml"))


def measured() -> list[bytes]:
    """CSVs that `profile` goes on with."""
    return [
        (_SAMPLES / "ops.csv").read_bytes(),
        *map(_first_rows, _files("results/profiles", "h200_*.csv")),
    ]


def scripts() -> list[bytes]:
    """Scripts that start vLLM."""
    return list(_files("tests/search/lint_samples", "*.sh"))


def mindie() -> list[bytes]:
    """Configurations of MindIE Server."""
    return [(_LINT / "mindie.json").read_bytes()]


def commands() -> list[bytes]:
    """Command lines, without the program's name."""
    return [line.encode() for line in COMMANDS]


def onnx_files() -> list[bytes]:
    """ONNX models, small ones."""
    from tests.models.frontends.onnx_cases import decoder, matmul2, mlp

    makers: tuple[Callable[[Path], Path], ...] = (mlp, matmul2, decoder)
    return [_saved(maker, "model.onnx") for maker in makers]


def exports() -> list[bytes]:
    """Exports of PyTorch, one with dynamic dims."""
    import torch

    def save(path: Path) -> None:
        module = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)
        )
        rows = ({0: torch.export.Dim("rows", min=2, max=64)},)
        made = torch.export.export(module, (torch.zeros(4, 8),), dynamic_shapes=rows)
        torch.export.save(made, path)

    return [_saved(save, "model.pt2")]


def operator_plans() -> list[bytes]:
    """Saved plans of `search_operators`."""
    from tests.search.oplevel.graphs import mlp

    from shardplan.search.oplevel.api import search_operators

    plan = search_operators(mlp(64, 256, 512), "atlas-300i-duo", {"x": 8})
    return [plan.dumps().encode()]


def _saved(save: Callable[[Path], object], name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        save(path)
        return path.read_bytes()
