"""All peers, in the order of the table's columns."""

from __future__ import annotations

from .cache_variants import CACHE_VARIANTS
from .jax_peer import Jax
from .onnx_peer import OnnxRuntime
from .openvino_peer import OpenVino
from .peer import NumPy, Own, Peer
from .torch_peer import PyTorch
from .variants import NarrowHeads, OneThread, WithoutOption
from .vllm_peer import Vllm

OWN = Own()
OTHERS: tuple[Peer, ...] = (NumPy(), PyTorch(), OnnxRuntime(), OpenVino(), Jax(), Vllm())
NARROW_HEADS = (NarrowHeads(32), NarrowHeads(64))
VARIANTS: tuple[Peer, ...] = (WithoutOption(), OneThread(), *NARROW_HEADS, *CACHE_VARIANTS)
PEERS: dict[str, Peer] = {peer.name: peer for peer in (OWN, *OTHERS, *VARIANTS)}

ALIASES = {"torch": "pytorch"}  # the name people import and install


def choose(names: list[str] | None) -> list[Peer]:
    """Pick selfattn and the peers of these names, or all that are installed.

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
    return [OWN, *(PEERS[name] for name in PEERS if name in wanted and name != OWN.name)]
