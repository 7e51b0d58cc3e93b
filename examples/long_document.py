"""MiniLM reads one long document together: its tokens are spread over MPI ranks, and every token attends to all.

    mpiexec -n 2 python -m mpi4py examples/long_document.py FILE...

Each rank keeps the vectors of its own tokens only. The result is the same to the last bit for any number of ranks. The
model has learned 512 positions; in a longer document several neighbours share one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
from bert import Bert
from mpi4py import MPI
from nn import Array

from selfattn.distributed import Group

TEXTS = sorted(Path(__file__).resolve().parent.parent.glob("**/*.md"))


def encode(bert: Bert, ids: Array, group: Group, order: str = "contiguous") -> tuple[Array, Array]:
    """Return this rank's rows of a document of tokens `ids`, and their vectors after the last layer."""
    rows = group.rows(len(ids), order)
    learned = len(bert.position_vectors)
    positions = np.arange(len(ids)) * learned // max(len(ids), learned)
    x = bert.embed(ids[rows], positions[rows])
    for block in bert.blocks:
        q, k, v = block.heads(x)
        x = block.rest(x, group.attention(q, k, v, rows=rows, layout="bshd"))
    return rows, x


def together(rows: Array, x: Array) -> Array | None:
    """Return the vectors of all ranks in the order of the document on rank 0, else None."""
    parts = MPI.COMM_WORLD.gather((rows, x))
    if parts is None:
        return None
    whole = np.empty((sum(len(part) for part, _ in parts), x.shape[1]), x.dtype)
    for part, vectors in parts:
        whole[part] = vectors
    return whole


def main() -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=TEXTS, help="default: this project's documents")
    parser.add_argument("--tokens", type=int, default=4000, help="at most this many (default: 4000)")
    parser.add_argument("--memory", type=float, help="MiB per rank for the document: say whether they suffice")
    args = parser.parse_args()
    try:
        from minilm import MiniLM

        model = MiniLM()
    except ImportError as error:
        print(f"long_document.py: {error}", file=sys.stderr)
        return 1
    text = "\n".join(file.read_text(encoding="utf8") for file in args.files)
    ids = model.ids(text)[: args.tokens]
    group = Group(MPI.COMM_WORLD)
    encode(model.bert, ids[: group.size], group)  # touches the weights, which any document needs
    before, start = settled_memory(), time.perf_counter()
    rows, x = encode(model.bert, ids, group)
    seconds = time.perf_counter() - start
    needed = MPI.COMM_WORLD.gather((memory("VmHWM") - before) / 2**10)
    whole = together(rows, x)
    if whole is not None and needed is not None:
        vector = whole.mean(axis=0, dtype=np.float64)
        print(f"{len(ids)} tokens on {group.size} ranks with {group.num_threads} threads each: {seconds:.2f} s")
        print(f"memory for the document, by rank: {', '.join(f'{n:.0f}' for n in needed)} MiB")
        if args.memory is not None:
            print(f"a budget of {args.memory:g} MiB per rank is {'kept' if max(needed) <= args.memory else 'exceeded'}")
        print(f"the document's vector begins with {np.round(vector / np.linalg.norm(vector), 4)[:4]}")
        print(f"SHA-256 of all vectors: {hashlib.sha256(whole.tobytes()).hexdigest()[:16]}")
    return 0


def settled_memory() -> int:
    """Return the memory of this process in KiB, without what is free already; its peak counts from here on."""
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    """Return the memory of this process, in KiB: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf8")
    return int(status.partition(f"{name}:")[2].split()[0])


if __name__ == "__main__":
    sys.exit(main())
