"""Attention over ranks on paper: prints the tables of docs/distributed.md, from a model of computing and network.

    python benchmarks/rank_model.py

The model is explained there; over_hosts.py compares it with measurements.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

BLOCK, CHUNK_BYTES, MOST_BLOCKS = 512, 4 << 20, 8  # as in selfattn/distributed/_travel.py
FEW = 8  # as in selfattn/distributed/_link.py
RANKS, TOKENS, GBITS = (8, 64, 512, 4096), (10**5, 10**6, 10**7, 10**8), (10, 100, 400)


class Network(NamedTuple):
    """What a rank can send and receive, in bytes per second, and how long a message is under way, in seconds."""

    bandwidth: float
    latency: float
    overhead: float = 1e-4  # of a message in the program

    @property
    def step(self) -> float:
        """The time until a rank knows of a short message: it asks again after a quarter of the time it has waited."""
        return 1.25 * self.latency + self.overhead


class Work(NamedTuple):
    """Causal attention over a sequence."""

    tokens: float
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2

    def computing(self, ranks: int, flops: float) -> float:
        """The seconds that a rank computes."""
        return 2.0 * self.tokens**2 * self.heads * self.head_dim / (ranks * flops)

    def row(self, heads: int) -> float:
        """The bytes of one token."""
        return float(heads * self.head_dim * self.itemsize)


def agreeing(ranks: int, network: Network) -> float:
    """The seconds of a small message from all to all."""
    return (1 if ranks <= FEW else _depth(ranks)) * network.step


def by_keys(ranks: int, work: Work, network: Network, computing: float) -> float:
    """The seconds of `Group.attention` if keys travel."""
    if ranks == 1:
        return computing
    row = work.row(2 * work.kv_heads)
    chunk = BLOCK * min(max(CHUNK_BYTES // (row * BLOCK), 1), MOST_BLOCKS)
    count = max(work.tokens / chunk, 1.0)
    owners = max(2 * ranks * chunk / work.tokens, 1)  # of one chunk
    # A chunk comes along a tree, on which one rank after another sends it.
    sends = sum(place.bit_length() for place in range(1, ranks)) / (ranks - 1)  # until a rank has it, on average
    busy = max(sends / owners, 1.0) * min(chunk, work.tokens) * row / network.bandwidth
    travelling = busy + 3 * sends * network.step  # announced, asked for, sent
    share = computing / count
    foreign = 1 - 1 / ranks
    chunks = travelling + (count - 1) * max(share, travelling) + share  # all that travel while another is computed
    return agreeing(ranks, network) + foreign * chunks + computing / ranks


def by_heads(ranks: int, work: Work, network: Network, computing: float) -> float:
    """The seconds of `Group.attention` if heads travel."""
    swapped = work.tokens * (ranks - 1) / ranks**2 * work.row(2 * work.heads + 2 * work.kv_heads)
    return agreeing(ranks, network) + computing + swapped / network.bandwidth + 6 * network.step


def by_states(ranks: int, work: Work, network: Network, computing: float) -> float:
    """The seconds of `Group.attention_with_kvcache` for one new token."""
    gathered = ranks * work.heads * (work.head_dim + 1) * 4
    return 2 * agreeing(ranks, network) + computing + gathered / network.bandwidth


def _depth(ranks: int) -> int:
    return math.ceil(math.log2(ranks))


def tables(work: Work, flops: float, latency: float) -> list[str]:
    """Return a table of times for each bandwidth, then those of hiding, of decoding and of memory."""
    networks = [Network(gbits * 1e9 / 8, latency) for gbits in GBITS]
    found = []
    for gbits, network in zip(GBITS, networks, strict=True):
        found.append(_table(f"{gbits} Gbit/s", TOKENS, partial(_cell, work, flops, network)))
    found.append(_table("hidden from", networks, lambda ranks, x: _round(hidden_from(ranks, work, flops, x))))
    found.append(_table("one new token", networks, lambda ranks, x: _seconds(by_states(ranks, work, x, 0))))
    # q, its copy in the state, out, k, v, and the copy of k and v that is sent; then the state's sums in float32.
    token = work.row(3 * work.heads + 4 * work.kv_heads) + work.heads * (work.head_dim + 2) * 4
    return [*found, _table("memory", TOKENS, lambda ranks, tokens: _bytes(tokens / ranks * token))]


def _table(name: str, columns: Sequence[Any], cell: Callable[[int, Any], str]) -> str:
    """Return a table with a row for each number of ranks."""
    heads = [f"{x.bandwidth * 8e-9:.0f} Gbit/s" if isinstance(x, Network) else _round(x) for x in columns]
    rows = [[f"{ranks:,}", *(cell(ranks, x) for x in columns)] for ranks in RANKS]
    lines = [[name, *heads], ["---"] * (1 + len(heads)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(work: Work, flops: float, network: Network, ranks: int, tokens: float) -> str:
    """Return the time of computing, and how many times as long calls take by keys and by heads."""
    work = work._replace(tokens=tokens)
    alone = work.computing(ranks, flops)
    heads = "–" if ranks > work.kv_heads else f"{by_heads(ranks, work, network, alone) / alone:.2f}"
    return f"{_seconds(alone)} × {by_keys(ranks, work, network, alone) / alone:.2f}, {heads}"


def hidden_from(ranks: int, work: Work, flops: float, network: Network) -> float:
    """The number of tokens from which communication costs less than a tenth of the time of computing."""
    tokens = 1000.0
    while tokens < 1e10:
        own = work._replace(tokens=tokens)
        alone = own.computing(ranks, flops)
        if by_keys(ranks, own, network, alone) < 1.1 * alone:
            break
        tokens *= 1.05
    return tokens


def _round(number: float) -> str:
    return f"{float(f'{number:.2g}'):,.0f}"


def _seconds(x: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x * 1e6:.3g} µs"


def _bytes(x: float) -> str:
    unit = next((u for u, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if x >= size), "kB")
    return f"{x / {'TB': 1e12, 'GB': 1e9, 'MB': 1e6, 'kB': 1e3}[unit]:.3g} {unit}"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flops", type=float, default=1e12, help="of a rank per second (default: 1e12, one socket)")
    parser.add_argument("--latency", type=float, default=1e-5, help="of a message, in seconds (default: 1e-5)")
    args = parser.parse_args()
    print("\n\n".join(tables(Work(0), args.flops, args.latency)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
