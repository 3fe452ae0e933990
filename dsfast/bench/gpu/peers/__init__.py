"""What each operator is timed against on a GPU, each peer prepared as it likes its inputs best.

A peer's expanding, padding and concatenating is done before the clock starts, though a user of MLA pays for it.
"""

from __future__ import annotations

from dsfast import ops
from dsfast.bench.gpu.cases import GpuCase
from dsfast.bench.gpu.peers import attention, experts, head, memory_bound, narrow, optimizers, route
from dsfast.bench.gpu.peers.peer import GpuPeer

PEERS: dict[str, dict[str, GpuPeer]] = (
    attention.PEERS | experts.PEERS | head.PEERS | memory_bound.PEERS | narrow.PEERS | optimizers.PEERS | route.PEERS
)
"""Part -> name -> peer; adamw's depend on the case."""


def peers_of(case: GpuCase) -> dict[str, GpuPeer]:
    """Name -> what `case` is timed against."""
    if case.part == "adamw":
        return optimizers.adamw_peers(clip=case.ours is not ops.adamw)
    return PEERS[case.part]
