"""Checks of `Group.rows` and `Group.attention`, see rank_checks.py."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
from checks_backward import hashes_of_gradients
from mpi4py import MPI
from rank_operands import one_process, operands, own, rows_of_options, sha, state, whole

import selfattn as sa
from selfattn.distributed import Group, _link, _travel
from selfattn.distributed._options import Options
from selfattn.distributed._relay import branches
from selfattn.distributed._rows import rows_of


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.astype(np.float64), other.astype(np.float64), rtol=0, atol=tolerance)


def check_rows(group: Group) -> None:
    for size in (1, 2, 3, 4, 5, 16):
        for length in (0, 1, 2, 3, 7, 100, 1001):
            for order in ("zigzag", "contiguous"):
                ranks = [rows_of("rows", length, order, rank, size) for rank in range(size)]
                assert sorted(np.concatenate(ranks)) == list(range(length))
                assert all(np.all(np.diff(rows) > 0) for rows in ranks)
            if length == 1001:  # the number of visible keys of all rows, with a causal limit
                work = [
                    float(np.sum(rows + 1))
                    for rows in (rows_of("rows", length, "zigzag", r, size) for r in range(size))
                ]
                assert max(work) < 1.07 * min(work)
    assert np.array_equal(group.rows(50), rows_of("rows", 50, "zigzag", group.rank, group.size))


def check_tree(group: Group) -> None:
    """Each receiver gets the message once, from a rank that has it; no other rank takes part."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 40))
        machines = list(rng.integers(0, rng.integers(1, 9), size))
        root = int(rng.integers(size))
        receivers = [rank for rank in range(size) if rank != root and rng.random() < rng.random()]
        found = [branches(rank, root, receivers, machines) for rank in range(size)]
        sent = sorted(target for _, targets in found for target in targets)
        assert sent == receivers
        assert [rank for rank, (source, _) in enumerate(found) if source is not None] == receivers
        assert all(
            target_source == rank
            for rank, (_, targets) in enumerate(found)
            for target_source in (found[t][0] for t in targets)
        )
        between = sum(
            machines[source] != machines[rank] for rank, (source, _) in enumerate(found) if source is not None
        )
        assert between == len({machines[rank] for rank in receivers} - {machines[root]})
        has, step = {root}, 0
        while len(has) < len(receivers) + 1:
            has |= {target for rank in has for target in found[rank][1]}
            step += 1
        assert step <= 2 + np.log2(size)


def options_of(rng: np.random.Generator, length: int, case: int) -> dict[str, Any]:
    """Return random options; mask and bias are for all rows."""
    found: dict[str, Any] = {"causal": bool(rng.integers(2))}
    choices = {
        "window": (int(rng.integers(2, 300)), int(rng.integers(0, 40))),
        "kv_lens": rng.integers(1, length + 1, 2),
        "kv_starts": rng.integers(0, length // 2 + 1, 2),
        "scale": 0.3,
        "softcap": 4.0,
        "alibi_slopes": sa.alibi_slopes(4),
        "sinks": rng.standard_normal(4).astype(np.float32),
        "mask": rng.random((2, 1, length, length)) < 0.8,
        "bias": rng.standard_normal((4, length, length)).astype(np.float32),
        "t5": sa.T5Bias(rng.standard_normal((32, 4)).astype(np.float32)),
        "dropout": 0.3,
    }
    for name in rng.choice(list(choices), 3, replace=False):
        found[str(name)] = choices[str(name)]
    if "dropout" in found:
        found["seed"] = 7
    if rng.integers(3) == 0:
        found["mask"] = rng.random((1, length)) < 0.7
    if case % 4 == 1:
        found["chunk"] = int(rng.integers(1, 300))
    if case % 4 == 2:
        found["prefix_lens"] = rng.integers(0, length + 1, 2)
        found.pop("window", None)
    return found


def check_sees(group: Group) -> None:
    """A rank asks for keys that one of its rows may see, and for no others."""
    rng = np.random.default_rng(0)
    skipped = 0
    for _ in range(400):
        options: dict[str, Any] = [
            {"causal": True},
            {"window": (int(rng.integers(9)), int(rng.integers(9)))},
            {"chunk": int(rng.integers(1, 20))},
            {"chunk": int(rng.integers(1, 20)), "causal": True},
            {"prefix_lens": rng.integers(0, 40, 1), "causal": True},
            {"prefix_lens": rng.integers(0, 40, 1), "window": (None, int(rng.integers(9)))},
            {"kv_lens": rng.integers(20, 40, 1), "kv_starts": rng.integers(0, 20, 1)},
        ][int(rng.integers(7))]
        queries, keys = (tuple(sorted(rng.choice(41, 2, replace=False).tolist())) for _ in range(2))
        shape = (1, 1, 40, 1)
        bias = np.full((40, 40), -np.inf)
        bias[slice(*queries), slice(*keys)] = 0
        _, lse = one_process(*np.zeros((3, *shape)), bias=bias, **options)
        found = Options("test", Group.attention, options).sees(queries, keys)
        assert found == bool(np.isfinite(lse).any()), (queries, keys, options)
        skipped += not found
    assert 40 < skipped < 300, skipped


def check_options(group: Group) -> list[str]:
    """A sweep against one process; returns hashes, which must not depend on the number of ranks."""
    hashes = []
    for case in range(24):
        rng = np.random.default_rng(case)
        length = int(rng.choice([1, 3, 40, 130, 700, 1300]))
        dtype = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16][case % 4]
        q, k, v = operands(length, seed=case, dtype=dtype)
        options = options_of(rng, length, case)
        rows = group.rows(length, ["zigzag", "contiguous"][case % 2])
        _travel.CHUNK_BYTES = [1, 4 << 20][case % 3 == 0]  # the fewest keys in a chunk, or many
        given = rows_of_options(options, rows)
        out, lse = group.attention(*own(group, rows, q, k, v), rows=rows, return_lse=True, **given)
        found = whole(group, rows, out), whole(group, rows, lse, -1)
        close(found, one_process(q, k, v, **options), 1e-5 if q.dtype.itemsize > 2 else 0.03)
        assert sha(*found) == sha(*state(q, k, v, **options)), (case, sorted(options))
        hashes.append(sha(*found))
    return hashes


def check_gradients(group: Group) -> list[str]:
    return hashes_of_gradients(group)


def check_heads(group: Group) -> None:
    for case in range(16):
        rng = np.random.default_rng(case)
        length = int(rng.choice([3, 130, 300]))
        q, k, v = operands(length, seed=case, heads=20, kv_heads=5 if group.size == 5 else 10)
        options = options_of(rng, length, case)
        of_heads = {"alibi_slopes": sa.alibi_slopes(20), "sinks": np.linspace(-1, 1, 20)}
        of_heads["bias"] = rng.standard_normal((20, length, length)).astype(np.float32)
        for name, per_head in of_heads.items():
            if name in options:
                options[name] = per_head
        if "t5" in options:
            options["t5"] = sa.T5Bias(rng.standard_normal((32, 20)).astype(np.float32))
        if case % 3 == 0:
            options["mask"] = rng.random((20, 1, length)) < 0.7
        rows = group.rows(length)
        given = rows_of_options(options, rows)
        out, lse = group.attention(*own(group, rows, q, k, v), rows=rows, by="heads", return_lse=True, **given)
        expected = one_process(q, k, v, **options)
        assert sha(whole(group, rows, out), whole(group, rows, lse, -1)) == sha(*expected), (case, sorted(options))


def check_layout_and_out(group: Group) -> None:
    q, k, v = operands(70)
    rows = group.rows(70)
    expected = group.attention(*own(group, rows, q, k, v), rows=rows, causal=True)
    swapped = [x.swapaxes(1, 2) for x in own(group, rows, q, k, v)]
    out = np.empty(expected.swapaxes(1, 2).shape, np.float32)
    found = group.attention(*swapped, rows=rows, causal=True, layout="bshd", out=out)
    assert found is out
    assert np.array_equal(out.swapaxes(1, 2), expected)
    one = group.attention(q[0, 0, rows], k[0, 0, rows], v[0, 0, rows], rows=rows, causal=True)  # 2-D: one head
    assert np.array_equal(
        one, group.attention(q[:1, :1, rows], k[:1, :1, rows], v[:1, :1, rows], rows=rows, causal=True)[0, 0]
    )
    narrow = [x.astype(np.float16) for x in (k, v)]
    found = group.attention(q[:, :, rows], narrow[0][:, :, rows], narrow[1][:, :, rows], rows=rows)
    close([whole(group, rows, found)], [sa.attention(q, *narrow)])
    found = group.attention(q[:, :, rows], k[:1, :, rows], v[:1, :, rows], rows=rows)  # leading axes broadcast
    close([whole(group, rows, found)], [sa.attention(q, k[:1], v[:1])])


def check_any_rows(group: Group) -> None:
    """Rows in any order, also a rank that has none."""
    q, k, v = operands(90)
    order = np.random.default_rng(3).permutation(9)
    blocks = np.array_split(order, group.size - 1) if group.size > 1 else [order]
    mine = blocks[group.rank] if group.rank < len(blocks) else []
    rows = np.concatenate([np.arange(10 * block, 10 * block + 10) for block in mine] or [np.arange(0)])
    out = group.attention(*own(group, rows, q, k, v), rows=rows, causal=True)
    close([whole(group, rows, out)], [sa.attention(q, k, v, causal=True)])


def check_single_rows(group: Group) -> None:
    """Rows are computed by the kernels that would compute the whole sequence, even if a rank has only one of them."""
    for length in (20, 150):
        q, k, v = operands(length)
        rows = np.arange(length - 1)[group.rank :: group.size]
        if group.rank == 0:
            rows = np.append(rows, length - 1)
        out, lse = group.attention(*own(group, rows, q, k, v), rows=rows, causal=True, return_lse=True)
        assert sha(whole(group, rows, out), whole(group, rows, lse, -1)) == sha(*state(q, k, v, causal=True))


def check_threads_and_cuts(group: Group) -> None:
    """Neither the number of threads nor the size of messages changes a bit."""
    q, k, v = operands(300)
    rows = group.rows(300)
    arrays = own(group, rows, q, k, v)
    expected = group.attention(*arrays, rows=rows, causal=True)
    assert np.array_equal(group.attention(*arrays, rows=rows, causal=True, num_threads=2), expected)
    largest, _link.LARGEST = _link.LARGEST, 1000
    try:
        assert np.array_equal(group.attention(*arrays, rows=rows, causal=True), expected)
        if group.size <= 2:
            close([group.attention(*arrays, rows=rows, causal=True, by="heads")], [expected])
    finally:
        _link.LARGEST = largest


def check_part_of_a_communicator(group: Group) -> None:
    """A group for each half of the ranks; both compute at once."""
    comm = MPI.COMM_WORLD.Split(group.rank % 2, group.rank)
    part = Group(comm, num_threads=1, timeout=60)
    q, k, v = operands(60, seed=group.rank % 2)
    rows = part.rows(60)
    out = part.attention(*own(part, rows, q, k, v), rows=rows, causal=True)
    close([whole(part, rows, out)], [sa.attention(q, k, v, causal=True)])
    part.close()
    comm.Free()


def check_memory(group: Group) -> list[Any]:
    """Return the rows of a rank, the bytes of a chunk, and the peak of the memory that a call adds, on each rank."""
    length, found = 8192, []
    rows = group.rows(length)
    q, k, v = np.ones((3, 2, len(rows), 16), np.float32)
    row_bytes = k[:, :1].nbytes + v[:, :1].nbytes
    for chunk_bytes in (1, 2048 * row_bytes):
        usual, _travel.CHUNK_BYTES = _travel.CHUNK_BYTES, chunk_bytes
        try:
            tracemalloc.start()
            group.attention(q, k, v, rows=rows, causal=True)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            _travel.CHUNK_BYTES = usual
        keys = max(chunk_bytes // row_bytes, sa.AttentionState.block_keys)
        found += group._link.exchange("test", (len(rows), keys * row_bytes, peak))
    return found


def check_many_small_calls(group: Group) -> None:
    """Neither memory nor the number of messages grows."""
    q, k, v = operands(group.size)
    rows = group.rows(group.size)
    arrays = own(group, rows, q, k, v)
    used = []
    for _ in range(4):
        for _ in range(2500 if group.size == 2 else 20):
            group.attention(*arrays, rows=rows)
        with open("/proc/self/statm") as file:
            used.append(int(file.read().split()[1]) * 4096)
    assert group._link._pending == []
    assert used[-1] - used[1] < 1 << 20, used
