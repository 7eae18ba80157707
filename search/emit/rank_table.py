"""HCCL rank tables, versions 1.0 and 1.2.

    1.0   server_list[] = {server_id, host_ip?, device[] = {device_id, device_ip?, rank_id}}
    1.2   the same with super_device_id, and super_pod_list[] = {super_pod_id, server_list[]}

1.0 serves 910A, A2 and 310P, and A3 outside a supernode; 1.2 serves A3 supernodes. All values
are strings. Ranks count from 0, server by server. `device_ip` is the address of the device's own
network port: needed on 910A and wherever a table names two servers or more.
Source: HCCL user guide, cluster information configuration (mirror-cann/hccl@e1a8dc9b
docs/zh/user_guide/cluster_info_config). Left out: ports and backup addresses, which HCCL
chooses itself; version 2.0 of the 950 generation.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardplan.models.errors import InputError
from shardplan.search.emit.common import Slot

__all__ = [
    "RankDevice",
    "Server",
    "check_address",
    "dump_json",
    "instance_tables",
    "listed",
    "rank_table",
]

_MAX_SERVER_ID = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDevice:
    """One rank of a server."""

    device_id: int
    """Physical id in the server."""
    device_ip: str = ""
    super_device_id: int | None = None
    """Id in the supernode; version 1.2 only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One server and the devices that take part, in rank order."""

    server_id: str
    devices: tuple[RankDevice, ...]
    host_ip: str = ""


def rank_table(
    servers: Sequence[Server], *, super_pod_id: str = "", device_ip_needed: bool = False
) -> dict[str, Any]:
    """The table of one communication world, ready for JSON.

    Version 1.2 when `super_pod_id` is given, 1.0 otherwise. `device_ip_needed` for devices that
    ask for it on one server too. Raises InputError where the table would break a rule above.
    """
    _check(servers, super_pod_id=super_pod_id, needed=device_ip_needed or len(servers) > 1)
    rank = 0
    listed = []
    for server in servers:
        entry: dict[str, Any] = {"server_id": server.server_id}
        if server.host_ip:
            entry["host_ip"] = server.host_ip
        entry["device"] = [_device(one, rank + i) for i, one in enumerate(server.devices)]
        rank += len(server.devices)
        listed.append(entry)
    made: dict[str, Any] = {
        "status": "completed",
        "version": "1.2" if super_pod_id else "1.0",
        "server_count": str(len(servers)),
        "server_list": listed,
    }
    if super_pod_id:
        ids = [{"server_id": server.server_id} for server in servers]
        made["super_pod_list"] = [{"super_pod_id": super_pod_id, "server_list": ids}]
    return made


def _device(device: RankDevice, rank: int) -> dict[str, str]:
    entry = {"device_id": str(device.device_id)}
    if device.super_device_id is not None:
        entry["super_device_id"] = str(device.super_device_id)
    if device.device_ip:
        entry["device_ip"] = device.device_ip
    entry["rank_id"] = str(rank)
    return entry


def _check(servers: Sequence[Server], *, super_pod_id: str, needed: bool) -> None:
    names = [server.server_id for server in servers]
    if not names or len(set(names)) < len(names):
        raise InputError("a rank table names each server once", got=f"server_id={names}")
    for server in servers:
        where = f"server_id={server.server_id!r}"
        if not 1 <= len(server.server_id) <= _MAX_SERVER_ID:
            raise InputError("a server_id has 1 to 64 characters", got=where)
        ids = [device.device_id for device in server.devices]
        if not ids or len(set(ids)) < len(ids) or min(ids) < 0:
            raise InputError("a server names each of its devices once", got=f"{where}: {ids}")
        for device in server.devices:
            if device.device_ip:
                check_address(device.device_ip, "device_ip")
            elif needed:
                raise InputError(
                    "every device of this rank table needs a device_ip",
                    got=f"{where}, device_id={device.device_id}",
                    hint="read it with `hccn_tool -i DEVICE_ID -ip -g` on the server",
                )
            if (device.super_device_id is None) is bool(super_pod_id):
                raise InputError(
                    "super_device_id and super_pod_id stand in version 1.2 and only together",
                    got=f"{where}, device_id={device.device_id}, super_pod_id={super_pod_id!r}",
                )
        if server.host_ip:
            check_address(server.host_ip, "host_ip")


def instance_tables(
    placed: Sequence[Sequence[Slot]], hosts: Sequence[str], ports: Mapping[tuple[int, int], str]
) -> list[dict[str, Any]]:
    """The table of each instance by itself: its slots are its servers.

    `hosts`: address of each node; `ports`: that of each device by node and device.
    """
    return [
        rank_table(
            [
                Server(
                    server_id=hosts[slot.node],
                    devices=tuple(
                        RankDevice(device_id=device, device_ip=ports[slot.node, device])
                        for device in slot.devices
                    ),
                )
                for slot in slots
            ]
        )
        for slots in placed
    ]


def listed(given: Sequence[str] | str, what: str, count: int) -> tuple[str, ...]:
    """The addresses as a tuple, empty when none is given."""
    words = given.split(",") if isinstance(given, str) else list(given)
    found = tuple(check_address(word.strip(), what) for word in words if word.strip())
    if found and (len(found) != count or len(set(found)) < count):
        raise InputError(
            f"{what} holds {count} different addresses, in order",
            got=f"{len(found)} given, {len(set(found))} different",
        )
    return found


def check_address(text: str, what: str) -> str:
    """The address as given. `InputError` unless it is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise InputError(
            f"{what} is an IP address", got=repr(text[:100]), hint="for example 192.168.1.8"
        ) from None
    return text


def dump_json(value: object) -> str:
    """Strict JSON, indented, ending in a newline."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
