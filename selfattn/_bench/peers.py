"""All known peers, in the order of the table's columns."""

from __future__ import annotations

from .peer import NumPy, Own, Peer
from .torch_peer import PyTorch

OWN = Own()
PEERS: dict[str, Peer] = {peer.name: peer for peer in (OWN, NumPy(), PyTorch())}

ALIASES = {"torch": "pytorch"}  # the name by which it is imported and installed


def add(*peers: Peer) -> None:
    """Register more peers in this process; a peer replaces an earlier one of the same name."""
    PEERS.update({peer.name: peer for peer in peers})


def others() -> list[Peer]:
    """Return the peers that are neither selfattn itself nor a variant of it."""
    return [peer for peer in PEERS.values() if not isinstance(peer, Own)]


def choose(names: list[str] | None) -> list[Peer]:
    """Return selfattn and the peers with these names; without names, all installed default peers.

    Raises
    ------
    ValueError
        For a name that is unknown or not installed.
    """
    if names is None:
        return [peer for peer in PEERS.values() if peer.by_default and peer.available()]
    wanted = [ALIASES.get(name, name) for name in names]
    for name in wanted:
        if name not in PEERS:
            raise ValueError(f"bench: no peer {name!r}; known are {', '.join(PEERS)}")
        if not PEERS[name].available():
            raise ValueError(f"bench: {PEERS[name].label} is not installed")
    return [peer for name, peer in PEERS.items() if name in wanted or name == OWN.name]
