"""Where the instances of prefill and decode pools lie, for every engine that starts them apart.

Instances fill the nodes one after another, the larger role first: their sizes divide a node or
are whole nodes, so none crosses a border. An instance is one server.
"""

from __future__ import annotations

from shardplan.models.errors import InputError
from shardplan.search.emit.common import MAX_RANKS, Slot, check_plan, refuse
from shardplan.search.emit.vllm_layout import Launch, Split, split_servers
from shardplan.search.plan import Plan, Pool

__all__ = [
    "ROLES",
    "address_list",
    "check_pools",
    "instance_of",
    "one_server",
    "placed",
    "shares_cards",
]

ROLES = ("prefill", "decode")
_EAGER = "vllm-ascend-eager"


def check_pools(target: str, plan: Plan) -> None:
    """`InputError` unless there is one pool a role, and both predict ahead or neither."""
    if [pool.role for pool in plan.pools] != list(ROLES):
        raise refuse(
            target,
            "a disaggregated plan has one prefill and one decode pool",
            got=", ".join(pool.role for pool in plan.pools),
            hint="search again with --serving disagg",
        )
    for pool in plan.pools:
        used = pool.cards
        if used > min(pool.cluster.ranks, MAX_RANKS):
            raise InputError(
                f"the instances of a pool fit its cluster, and have at most {MAX_RANKS} ranks",
                got=f"{pool.role}: {pool.instances} of {pool.strategy.ranks} ranks, "
                f"cluster={pool.cluster.ranks}",
                hint="search again on this cluster",
            )
    prefill, decode = (pool.strategy for pool in plan.pools)
    if (prefill.mtp > 0) != (decode.mtp > 0):
        raise refuse(
            target,
            "both pools predict tokens ahead, or neither: the layer's cache is handed over",
            got=f"prefill mtp={prefill.mtp}, decode mtp={decode.mtp}",
            hint="search again with --serving disagg",
        )


def instance_of(plan: Plan, pool: Pool) -> Plan:
    """The plan of one instance; prefill runs eagerly, as it is priced."""
    way, request = pool.strategy, plan.request
    if pool.role == "prefill":
        way = way.model_copy(update={"batch": min(way.batch, way.chunk // (1 + way.mtp))})
        request = request.model_copy(update={"engine_profile": _EAGER})
    changes = {
        "strategy": way,
        "cluster": pool.cluster,
        "memory": pool.memory,
        "request": request,
        "pools": (),
        "transfer": None,
    }
    one = plan.model_copy(update=changes)
    check_plan(one)
    return one


def one_server(target: str, plan: Plan) -> Split:
    """How an instance is one server. `InputError` where it would be several."""
    split = split_servers(plan, target)
    if split.servers > 1:
        way = plan.strategy
        raise refuse(
            target,
            "an instance of a pool is one server",
            got=f"tp={way.tp}, pp={way.pp}, dp={way.dp}, ep={way.ep}: {split.servers} servers",
            hint="plan replicas as instances",
        )
    return split


def shares_cards(plan: Plan) -> bool:
    """Whether both pools take their nodes from one cluster."""
    return plan.request.prefill_cards is None


def address_list(plan: Plan, role: str) -> str:
    """Shell variable that lists the addresses of a pool's nodes."""
    return "NODE_ADDRESSES" if shares_cards(plan) else f"{role.upper()}_NODE_ADDRESSES"


def placed(target: str, plan: Plan) -> list[tuple[Launch, ...]]:
    """Launches of each pool, in the order of `ROLES`: instances side by side, the larger first."""
    places: dict[str, tuple[Launch, ...]] = {}
    heads: dict[int, int] = {}
    start = 0
    for pool in sorted(plan.pools, key=lambda one: -one.strategy.ranks):
        if not shares_cards(plan):
            start, heads = 0, {}
        size, node_ranks = pool.strategy.ranks, pool.cluster.ranks_per_node
        made: list[Launch] = []
        for server in range(pool.instances):
            made += _server(target, pool, server, start + server * size, node_ranks, heads)
        start += pool.instances * size
        places[pool.role] = tuple(made)
    return [places[role] for role in ROLES]


def _server(
    target: str, pool: Pool, server: int, start: int, per_node: int, heads: dict[int, int]
) -> list[Launch]:
    """One instance from rank `start` on; `heads`: servers of each node so far."""
    way = pool.strategy
    node, first = divmod(start, per_node)
    nodes = -(-way.ranks // per_node)
    straddles = first + way.ranks > per_node if nodes == 1 else first or way.ranks % per_node
    if straddles:
        raise refuse(
            target,
            "an instance must fit inside one node or fill whole nodes",
            got=f"{pool.role} instances of {way.ranks} on nodes of {per_node}",
            hint=f"search again on {pool.cluster.name}",
        )
    offset = heads.get(node, 0)
    heads[node] = offset + 1
    return [
        Launch(
            server=server,
            slot=Slot(node=node + index, first=first, ranks=min(way.ranks, per_node)),
            head=node,
            index=index,
            nodes=nodes,
            spans=way.tp * way.pp > per_node,
            port_offset=offset,
        )
        for index in range(nodes)
    ]
