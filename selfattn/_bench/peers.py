"""All peers, in the order of the table's columns."""

from __future__ import annotations

from .onnx_peer import OnnxRuntime
from .peer import NumPy, Own, Peer
from .torch_peer import PyTorch

OWN = Own()
PEERS: dict[str, Peer] = {peer.name: peer for peer in (OWN, NumPy(), PyTorch(), OnnxRuntime())}


def choose(names: list[str] | None) -> list[Peer]:
    """Pick selfattn and the peers of these names, or all that are installed.

    Raises
    ------
    ValueError
        For a name that is unknown or not installed.
    """
    if names is None:
        return [peer for peer in PEERS.values() if peer.available()]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"bench: no peer {name!r}; known are {', '.join(PEERS)}")
        if not PEERS[name].available():
            raise ValueError(f"bench: {PEERS[name].label} is not installed")
    return [OWN, *(PEERS[name] for name in PEERS if name in names and name != OWN.name)]
