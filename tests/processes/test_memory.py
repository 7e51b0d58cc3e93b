"""Memory: linear in the length, steady over many calls, and an exception when there is none."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytestmark = [
    pytest.mark.uncounted,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' own accounts"),
]

PRELUDE = """
    import resource
    import numpy as np
    import selfattn as sa

    def peak():  # getrusage would start with that of the process that started this one
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
"""


def test_peak_is_linear_in_the_length(run_python: Any) -> None:
    added = run_python(
        PRELUDE
        + """
    for n in (8192, 16384):
        x = np.ones((1, n, 64), np.float32)
        before = peak()
        out, lse = sa.attention(x, x, x, causal=True, return_lse=True, num_threads=2)
        print(peak() - before - out.nbytes)
    """
    ).split()
    # Scores would take 256 MiB and 1 GiB.
    assert all(int(n) < 8 << 20 for n in added)


def test_gradients_store_nothing_of_all_pairs(run_python: Any) -> None:
    added = run_python(
        PRELUDE
        + """
    x = np.ones((1, 12_000, 16), np.float32)
    lse = np.full((1, 12_000), 10, np.float32)
    wrt = ("q", "k", "v", "scale", "bias", "alibi_slopes")
    options = {"bias": np.zeros((12_000, 1), np.float32), "alibi_slopes": [0.0], "causal": True, "num_threads": 2}
    sa.attention_backward(x, x, x, x, x, lse, wrt=wrt, **options)
    before = peak()
    grads = sa.attention_backward(x, x, x, x, x, lse, wrt=wrt, **options)
    first = peak()
    sa.attention_backward(x, x, x, x, x, lse, wrt=("k",), bias=np.zeros(12_000, np.float32), num_threads=2)
    print(before, first - before, peak() - first)
    """
    ).split()
    assert int(added[0]) < 100 << 20  # scores would take 550 MiB
    assert all(int(n) < 8 << 20 for n in added[1:])


def test_relative_attention_stores_nothing_of_all_pairs(run_python: Any) -> None:
    added = run_python(
        PRELUDE
        + """
    x = np.ones((1, 12_000, 8), np.float32)
    u = np.zeros((1, 8), np.float32)
    sa.relative_attention(x[:, :9], x[:, :18], x[:, :18], x, u, u, mem_len=9, num_threads=2)
    before = peak()
    out = sa.relative_attention(x[:, 6_000:], x, x, x, u, u, mem_len=6_000, num_threads=2)
    print(peak() - before - out.nbytes)
    """
    )
    assert int(added) < 8 << 20  # scores would take 275 MiB


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_merging_takes_no_memory_but_its_result(run_python: Any, dtype: str) -> None:
    most, result = run_python(
        PRELUDE
        + f"""
    outs = np.ones((2, 8 << 20), np.uint8).view({dtype!r}).reshape(2, -1, 128)
    lses = np.zeros(outs.shape[:2], np.result_type(outs.dtype, np.float32))
    some = outs.shape[1] // 8
    sa.merge_states(outs[:, :some], lses[:, :some])
    before = peak()
    out, lse = sa.merge_states(outs, lses)
    print(peak() - before, out.nbytes)
    """
    ).split()
    assert int(most) < 1.2 * int(result)


def test_packed_sequences_take_no_memory_of_the_square(run_python: Any) -> None:
    added = run_python(
        PRELUDE
        + """
    x = np.ones((16_384, 1, 64), np.float32)
    sa.attention_varlen(x[:100], x[:100], x[:100], [0, 50, 100], num_threads=2)
    before = peak()
    out = sa.attention_varlen(x, x, x, [0, 100, 8_000, 8_000, 16_384], causal=True, num_threads=2)
    print(peak() - before - out.nbytes)
    """
    )
    assert int(added) < 8 << 20


def test_steady_over_many_calls(run_python: Any) -> None:
    growth = run_python(
        PRELUDE
        + """
    rng = np.random.default_rng(0)
    w = [rng.standard_normal((32, 32)).astype(np.float32) for _ in range(4)]
    layer = sa.SelfAttention(*w, num_heads=4)
    problems = [rng.standard_normal((3, 2, n, 16)).astype(np.float32) for n in (1, 17, 100, 300)]
    bad = np.zeros((3, 3), np.float32)

    def mixed(i):
        q, k, v = problems[i % 4]
        asked = {'causal': i % 3 == 0, 'return_lse': i % 5 == 0, 'return_weights': i % 7 == 0}
        sa.attention(q, k, v, num_threads=1 + i % 2, **asked)
        layer(problems[1].reshape(1, -1, 32)[:, : 1 + i % 40], num_threads=1 + i % 2)
        try:
            sa.attention(bad, problems[0], bad)
        except ValueError:
            pass

    for i in range(2000):
        mixed(i)
    before = resident()
    for i in range(10_000):
        mixed(i)
    print(resident() - before)
    """
    )
    assert int(growth) < 1 << 20


def test_large_scratch_is_given_back(run_python: Any) -> None:
    held = run_python(
        PRELUDE
        + """
    w = np.ones((64, 512), np.float32)
    layer = sa.SelfAttention(w, w, w, num_heads=8)
    x, out = np.ones((24576, 64), np.float32), np.ones((24576, 512), np.float32)
    layer(x[:64])
    before = resident()
    layer(x, window=(8, 0), out=out)  # 144 MiB of projections
    print(resident() - before, peak() - before)
    """
    )
    now, most = map(int, held.split())
    assert most > 130 << 20
    assert now < 12 << 20


def test_scratch_is_reused(run_python: Any) -> None:
    # With `out` given, the hundredth call asks the system for no more memory than the second.
    growth = run_python(
        PRELUDE
        + """
    x = np.ones((1, 8, 600, 64), np.float32)
    out = np.empty_like(x)
    for _ in range(3):
        sa.attention(x, x, x, out=out, num_threads=2)
    before = peak()
    for _ in range(100):
        sa.attention(x, x, x, out=out, num_threads=2)
    print(peak() - before)
    """
    )
    assert int(growth) < 256 << 10


@pytest.mark.parametrize(
    "call",
    [
        "sa.attention(wide, key, key)",  # the result
        "sa.attention(x, x, x, return_weights=True)",
        "sa.attention(x[:1], key, key, return_weights=True, num_threads=1)",
        "sa.attention(head, head, head)",  # scratch
        "layer(x)",
    ],
)
def test_no_memory_is_an_exception(run_python: Any, call: str) -> None:
    printed = run_python(
        PRELUDE
        + f"""
    one = np.ones((1, 1), np.float32)
    x = np.broadcast_to(one, (200_000, 64))
    wide = np.broadcast_to(one, (1, 1 << 28, 4))
    key = np.broadcast_to(one, (1 << 29, 4)) if "1]" in {call!r} else np.broadcast_to(one, (8, 4))
    x = np.broadcast_to(one, (200_000, 4)) if "x[:1]" in {call!r} else x
    head = np.broadcast_to(one, (40, 1 << 24))
    layer = sa.SelfAttention(*[np.ones((64, 4096), np.float32)] * 3, num_heads=1)
    y = np.ones((60, 8), np.float32)
    sa.attention(y, y, y)
    limit = 600 << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit + resident() * 12, limit + resident() * 12))
    try:
        {call}
    except MemoryError:
        print("MemoryError")
    assert np.array_equal(sa.attention(y, y, y), y)
    print("works")
    """,
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
    )
    assert printed.split() == ["MemoryError", "works"]
