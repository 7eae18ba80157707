"""Target `docker-compose`: files that Compose takes, and what their containers would run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.search.emit_cases import HERE, emit_plan, moe, parser_of, run_script

from shardplan.models.errors import InputError
from shardplan.search.api import search
from shardplan.search.emit import emit
from shardplan.search.emit.schemas import schema
from shardplan.search.plan import Plan

yaml = pytest.importorskip("yaml")


def _composed(plan: Plan, folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Services by file; every file held against the schema, every script against its mount."""
    emit(plan, "docker-compose", folder / "out", force=True, **options)
    found = {}
    for path in sorted((folder / "out").glob("compose_*.yaml")):
        whole = yaml.safe_load(path.read_text(encoding="utf-8"))
        rule = {**schema("compose"), "$ref": "#/$defs/Compose"}
        jsonschema.Draft202012Validator(rule).validate(whole)
        found[path.name] = whole["services"]
        for one in whole["services"].values():
            for volume in one["volumes"]:
                if volume.startswith("./"):
                    assert (folder / "out" / volume.partition(":")[0]).exists()
            if "command" in one:
                script = one["command"][1].removeprefix("/scripts/")
                assert (folder / "out" / script).is_file()
    return found


def _cards(service: dict[str, Any]) -> list[int]:
    """Devices of a container by number on its node."""
    cards = [re.fullmatch(r"/dev/davinci(\d+):/dev/davinci\1", one) for one in service["devices"]]
    return [int(card.group(1)) for card in cards if card]


def test_copies_share_a_node(tmp_path: Path) -> None:
    """dp 2 of tp 4: cards 4 to 7 of the second are 0 to 3 inside; a port each; nginx before."""
    files = _composed(emit_plan(tp=4, dp=2), tmp_path)
    assert sorted(files) == ["compose_balancer.yaml", "compose_node0.yaml"]
    first, second = files["compose_node0.yaml"].values()
    assert (_cards(first), _cards(second)) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert first["network_mode"] == "host"
    script = tmp_path / "out" / "server-1_node0.sh"
    (call,) = run_script(script, "vllm", **HERE)
    assert call.environment["ASCEND_RT_VISIBLE_DEVICES"] == "0,1,2,3"
    flags = parser_of("vllm_flags", "serve").parse_args(call.words[2:])
    assert flags.port == "8001"
    assert "8001/health" in second["healthcheck"]["test"][3]
    balancer = (tmp_path / "out" / "balancer.conf").read_text(encoding="utf-8")
    assert "server 127.0.0.1:8001;" in balancer


def test_a_server_over_nodes_asks_for_addresses(tmp_path: Path) -> None:
    """tp 8 dp 2 ep 16: a part on each node, of which the head alone is asked for its health."""
    files = _composed(emit_plan(dp=2, ep=16, exchange="alltoall", model=moe()), tmp_path)
    assert sorted(files) == ["compose_node0.yaml", "compose_node1.yaml"]
    head = files["compose_node0.yaml"]["server-0"]
    worker = files["compose_node1.yaml"]["server-0"]
    assert head["environment"]["HEAD_ADDRESS"] == "${HEAD_ADDRESS:?see README.md}"
    assert "healthcheck" in head
    assert "healthcheck" not in worker
    (call,) = run_script(tmp_path / "out" / "server-0_node1.sh", "vllm", **HERE)
    assert "--headless" in call.words


def test_pools_have_a_proxy(tmp_path: Path) -> None:
    """No card of a node is in two containers; ports of the connector are those of the devices."""
    asked: dict[str, Any] = {"input_len": 1024, "output_len": 128, "ttft_ms": 800, "tpot_ms": 40}
    plan = search("llama-3.1-8b", "atlas-800t-a2", serving="disagg", **asked).plan
    files = _composed(plan, tmp_path)
    services = files["compose_node0.yaml"]
    assert len(services) == sum(pool.instances for pool in plan.pools)
    cards = [card for one in services.values() for card in _cards(one)]
    assert len(cards) == len(set(cards))
    for label, one in services.items():
        (call,) = run_script(tmp_path / "out" / f"{label}_node0.sh", "vllm", **HERE)
        config = call.words[call.words.index("--kv-transfer-config") + 1]
        assert f'"kv_port": "{28000 + _cards(one)[0]}"' in config
    proxy = files["compose_proxy.yaml"]["proxy"]
    assert proxy["environment"]["NODE_ADDRESSES"] == "${NODE_ADDRESSES:?see README.md}"
    (call,) = run_script(
        tmp_path / "out" / "proxy.sh", "python3", PROXY="p.py", NODE_ADDRESSES="10.0.0.1"
    )
    assert call.words.count("10.0.0.1") == len(services)


@pytest.mark.parametrize("name", ["'; touch pwned #", "a: b\n- c", "${HOME}", "", "$(x)"])
def test_hostile_names_stay_text(tmp_path: Path, name: str) -> None:
    """Nothing of a name is a variable to Compose, nor a command."""
    files = _composed(emit_plan(model={"name": name, "source": name}), tmp_path)
    text = (tmp_path / "out" / "compose_node0.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"\$\{(\w+)", text)) == {"MODEL"}
    assert text.count("$") == 1
    assert len(files) == 1


def test_options_and_refusals(tmp_path: Path) -> None:
    for image in ("a b", "$(x)", "${IMAGE}", "x\ny"):
        with pytest.raises(InputError, match="image of docker-compose"):
            emit(emit_plan(), "docker-compose", tmp_path / "no", image=image)
    with pytest.raises(InputError, match="context parallelism"):
        emit(emit_plan(cp=2), "docker-compose", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    files = _composed(emit_plan(), tmp_path, image="mine:1")
    assert files["compose_node0.yaml"]["server-0"]["image"] == "mine:1"
