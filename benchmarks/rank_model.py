"""Attention over ranks on paper: prints the tables of docs/distributed.md, from a model of computing and network.

    python benchmarks/rank_model.py

The model is explained there; over_hosts.py compares it with measurements.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

BLOCK, CHUNK_BYTES, MOST_BLOCKS = 512, 4 << 20, 8  # as in selfattn/distributed/_travel.py
RANKS, TOKENS, GBITS = (8, 64, 512, 4096), (10**5, 10**6, 10**7, 10**8), (10, 100, 400)


class Network(NamedTuple):
    """What a rank can send and receive, in bytes per second, and how long a message is under way, in seconds."""

    bandwidth: float
    latency: float
    overhead: float = 1e-4  # of a message in the program; most of it goes by until a rank that sleeps asks again

    @property
    def step(self) -> float:
        """The time until a rank knows of a short message."""
        return self.latency + self.overhead


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
    """The seconds of two small messages from all to all."""
    return 2 * _depth(ranks) * network.step


def by_keys(ranks: int, work: Work, network: Network, computing: float) -> float:
    """The seconds of `Group.attention` if keys travel."""
    if ranks == 1:
        return computing
    row = work.row(2 * work.kv_heads)
    chunk = BLOCK * min(max(CHUNK_BYTES // (row * BLOCK), 1), MOST_BLOCKS)
    count = max(work.tokens / chunk, 1.0)
    owners = max(2 * ranks * chunk / work.tokens, 1)  # of one chunk
    # A chunk comes along a tree, on which one rank after another sends it as often as the tree is deep.
    busy = max(_depth(ranks) / owners, 1.0) * min(chunk, work.tokens) * row / network.bandwidth
    travelling = busy + 3 * _depth(ranks) * network.step  # announced, asked for, sent
    share = computing / count
    foreign = 1 - 1 / ranks
    return agreeing(ranks, network) + travelling + count * (foreign * max(share, travelling) + share / ranks)


def by_heads(ranks: int, work: Work, network: Network, computing: float) -> float:
    """The seconds of `Group.attention` if heads travel."""
    swapped = work.tokens * (ranks - 1) / ranks**2 * work.row(2 * work.heads + 2 * work.kv_heads)
    return agreeing(ranks, network) + computing + swapped / network.bandwidth + 6 * network.step


def by_states(ranks: int, work: Work, network: Network, computing: float) -> float:
    """The seconds of `Group.attention_with_kvcache` for one new token."""
    gathered = ranks * work.heads * (work.head_dim + 1) * 4
    return agreeing(ranks, network) + computing + gathered / network.bandwidth + _depth(ranks) * network.step


def _depth(ranks: int) -> int:
    return math.ceil(math.log2(ranks))


def tables(work: Work, flops: float, latency: float) -> Iterator[list[list[str]]]:
    """Yield a table of times for each bandwidth, then those of hiding, of decoding and of memory."""
    columns = [_power(tokens) for tokens in TOKENS]
    for gbits in GBITS:
        network = Network(gbits * 1e9 / 8, latency)

        def cell(ranks: int, tokens: float, network: Network = network) -> str:
            own = work._replace(tokens=tokens)
            alone = own.computing(ranks, flops)
            keys = by_keys(ranks, own, network, alone) / alone
            heads = "–" if ranks > work.kv_heads else f"{by_heads(ranks, own, network, alone) / alone:.2f}"
            return f"{_seconds(alone)} × {keys:.2f}, {heads}"

        yield [[f"{gbits} Gbit/s", *columns], *([str(r), *(cell(r, s) for s in TOKENS)] for r in RANKS)]
    networks = [Network(gbits * 1e9 / 8, latency) for gbits in GBITS]
    head = [f"{gbits} Gbit/s" for gbits in GBITS]
    hidden = [[_power(hidden_from(ranks, work, flops, network)) for network in networks] for ranks in RANKS]
    yield [["keys are hidden from", *head], *([str(r), *row] for r, row in zip(RANKS, hidden, strict=True))]
    steps = [[_seconds(by_states(ranks, work, network, 0)) for network in networks] for ranks in RANKS]
    yield [["one new token", *head], *([str(r), *row] for r, row in zip(RANKS, steps, strict=True))]
    token = work.row(2 * work.heads + 4 * work.kv_heads)  # q, out, k, v, and the copy of k and v that is sent
    yield [["memory", *columns], *([str(r), *(_bytes(s / r * token) for s in TOKENS)] for r in RANKS)]


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


def _power(number: float) -> str:
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
    for rows in tables(Work(0), args.flops, args.latency):
        rows.insert(1, ["---"] * len(rows[0]))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
