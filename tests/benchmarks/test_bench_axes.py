"""The benchmark's axes: types of numbers and precisions of workloads and peers. Nothing about speed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from bench_axes import AXES, SUFFIX

import selfattn
from selfattn._bench import numbers
from selfattn._bench.check import (
    COARSE_ERRORS,
    Mismatch,
    Units,
    check,
    check_coarsely,
    coarse_error,
    expected_parts,
    unit_of,
)
from selfattn._bench.measure import check_all, measure
from selfattn._bench.peer import NumPy
from selfattn._bench.peers import OWN, PEERS, others
from selfattn._bench.report import table
from selfattn._bench.timing import Peaks
from selfattn._bench.workload import Workload
from selfattn._bench.workloads import WORKLOADS, attention_workload, layer_workload
from workbench.peers import NARROW_HEADS

NARROW = ("bfloat16", "float16")
axes = pytest.mark.parametrize(("dtype", "precision"), AXES)

CASES = (
    attention_workload("square", "a test", (4, 2), 40, 32, causal=True),
    attention_workload("wide", "a test", 2, 33, 128),
    attention_workload("few", "a test", (4, 2), (4, 70), 32, causal=True),
    attention_workload("decode", "a test", (8, 2), (1, 300), 64, causal=True),
    attention_workload("masked", "a test", 2, (20, 30), 16, mask="pairs", bias=True, alibi=True),
    layer_workload("layer", "a test", 2, 30, 64, 4),
)


def by_name(workloads):
    return pytest.mark.parametrize("workload", workloads, ids=lambda w: w.name)


@axes
def test_a_workload_in_another_type_is_the_same_case_under_its_own_name(dtype, precision):
    first = WORKLOADS["decode-4k-gqa"]
    varied = first.varied(dtype, precision)
    suffix = SUFFIX[dtype if precision == "highest" else precision]
    assert varied == replace(first, name=f"decode-4k-gqa-{suffix}", dtype=dtype, precision=precision)
    assert varied.varied(dtype, precision) == varied
    assert Workload.from_dict(json.loads(json.dumps(asdict(varied)))) == varied
    assert varied.flops() == first.flops()
    assert varied.memory_bound
    assert varied.kv_bytes() == first.kv_bytes() * numbers.numpy_dtype(dtype).itemsize // 4


def test_results_from_before_there_were_precisions_are_read():
    record = asdict(WORKLOADS["bert-512"])
    del record["precision"]
    assert Workload.from_dict(record) == WORKLOADS["bert-512"]


@pytest.mark.parametrize("dtype", NARROW)
def test_arrays_are_rounded_to_the_type(dtype):
    for case in CASES:
        wide, narrow = case.make_arrays(), case.varied(dtype).make_arrays()
        for name in set(narrow) - {"mask", "alibi_slopes"}:
            assert narrow[name].dtype == numbers.numpy_dtype(dtype)
            assert np.array_equal(narrow[name], wide[name].astype(narrow[name].dtype))


@pytest.mark.parametrize("name", [peer.name for peer in (OWN, *others(), *NARROW_HEADS)])
@axes
@by_name(CASES)
def test_peers_are_right(name, workload, dtype, precision):
    peer, workload = PEERS[name], workload.varied(dtype, precision)
    if not peer.available():
        pytest.skip(f"{peer.label} is not installed")
    reason = peer.why_not(workload)
    if reason:
        pytest.skip(reason)
    arrays = workload.make_arrays()
    runs = {"selfattn": OWN.prepare(workload, arrays, 2), name: peer.prepare(workload, arrays, 2)}
    assert np.asarray(runs[name]()).dtype == numbers.numpy_dtype(dtype)
    assert 0 <= check_all(workload, arrays, runs, [peer])[name] <= 1


def test_precision_reaches_selfattn_and_pytorch(monkeypatch):
    asked = []
    monkeypatch.setattr(selfattn, "attention", lambda *qkv, **options: asked.append(options.get("precision")))
    for precision in numbers.PRECISIONS:
        workload = CASES[0].varied("float32", precision)
        OWN.prepare(workload, workload.make_arrays(), 1)()
    assert asked == [None, "high", "medium"]
    torch = pytest.importorskip("torch")
    for precision in reversed(numbers.PRECISIONS):
        workload = CASES[0].varied("float32", precision)
        PEERS["pytorch"].prepare(workload, workload.make_arrays(), 1)
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("onnxruntime", "bfloat16", "have no bfloat16"),
        ("openvino", "float16", "float32 or bfloat16"),
        ("jax", "float16", "no products of float16"),
        ("numpy", "bfloat16", "16-bit numbers"),
        ("numpy", "float16", "16-bit numbers"),
        ("vllm", "float64", "not float64"),
    ],
)
def test_peers_say_what_they_cannot_do(name, dtype, reason):
    assert reason in PEERS[name].why_not(CASES[0].varied(dtype))
    supported = PEERS[name].why_not(CASES[0])
    assert not supported


def test_what_a_peer_cannot_do_is_below_the_table():
    result = measure(CASES[0].varied("float16"), [NumPy()], threads=1, seconds=0.01)
    assert "NumPy: square-f16: it multiplies 16-bit numbers" in table([result])


@pytest.mark.parametrize("dtype", NARROW)
@by_name([case for case in CASES if case.name != "masked"])
def test_our_own_results_keep_the_tight_bound(workload, dtype):
    workload = workload.varied(dtype)
    arrays = workload.make_arrays()
    with selfattn.use_isa("portable"):  # which rounds nothing but results
        expected = expected_parts(workload, arrays)
        right = np.asarray(OWN.prepare(workload, arrays, threads=1)())
    assert 0.5 < check("right", right, expected) <= 1
    ulp = np.spacing(right.astype(np.float32)) * 2.0 ** (16 if dtype == "bfloat16" else 13)
    changed = (right.astype(np.float32) + 1.5 * ulp).astype(right.dtype)
    with pytest.raises(Mismatch):
        check("an ulp off", changed, expected)


def test_a_matrix_unit_may_round_what_it_multiplies():
    def units(dtype, precision, unit):
        return Units.of(2.0, dtype, precision, unit)

    assert units("float64", "highest", "amx") == units("float32", "high", "fma") == Units(24, 24, 24)
    assert units("float32", "highest", "amx") == units("bfloat16", "highest", "fma") == Units(24, 24, 24)
    assert units("bfloat16", "highest", "amx") == Units(24 + 2**16, 24, 24)
    assert units("float16", "highest", "amx") == Units(24 + 3 * 2**8, 24 + 2 * 2**8, 24 + 12 * 2**8)
    assert units("float32", "medium", "pairs") == Units(24 + 3 * 2**17, 24 + 2 * 2**17, 24 + 12 * 2**17)


@pytest.mark.parametrize("dtype", NARROW)
@by_name(CASES)
def test_the_unit_is_the_one_that_explain_names(workload, dtype, monkeypatch):
    workload, asked = workload.varied(dtype), []
    monkeypatch.setattr(selfattn, "explain", lambda *qkv, **options: asked.append((qkv, options)) or {"unit": "amx"})
    tight = workload.make_arrays()
    assert unit_of(workload) == "amx"
    (shapes, options), w = asked.pop(), workload
    assert [x.shape for x in shapes] == [
        (w.batch, w.num_heads, w.q_len, w.head_dim),
        (w.batch, w.num_kv_heads, w.kv_len, w.head_dim),
        (w.batch, w.num_kv_heads, w.kv_len, w.value_dim),
    ]
    assert {x.dtype for x in shapes} == {numbers.numpy_dtype(dtype)}
    assert options == {"precision": "highest"}
    rounded = expected_parts(workload, tight)
    monkeypatch.setattr(selfattn, "explain", lambda *qkv, **options: {"unit": "fma"})
    exact = expected_parts(workload, tight)
    assert all((r.bound > e.bound).all() for r, e in zip(rounded, exact, strict=True))


class Wrong(NumPy):
    """Selfattn's own answer, modified."""

    def __init__(self, spoil):
        self.spoil = spoil

    def why_not(self, workload):
        return ""

    def prepare(self, workload, arrays, threads):
        run = OWN.prepare(workload, arrays, threads)
        return lambda: self.spoil(np.asarray(run()).astype(np.float64))


@axes
def test_a_peer_may_lose_bits_but_not_keys(dtype, precision):
    workload = replace(CASES[0], q_len=200, kv_len=200).varied(dtype, precision)
    allowed = COARSE_ERRORS[dtype if precision == "highest" else precision]
    assert coarse_error(workload) == allowed
    measure(workload, [Wrong(lambda out: out * (1 + 0.9 * allowed))], threads=1, seconds=0.0)
    for spoil in (
        lambda out: out * (1 + 1.1 * allowed),
        lambda out: np.where(np.arange(200)[:, None] < 190, out, np.roll(out, 1, axis=-2)),
        lambda out: np.where(np.arange(200)[:, None] < 199, out, np.nan),
    ):
        with pytest.raises(Mismatch, match="differs from selfattn"):
            measure(workload, [Wrong(spoil)], threads=1, seconds=0.0)


def test_the_coarse_check_refuses_other_shapes():
    with pytest.raises(Mismatch, match="shape"):
        check_coarsely("x", np.ones((2, 3)), np.ones((3, 2)), 0.1)
    assert check_coarsely("x", np.full(3, 1.01), np.ones(3), 0.02) == pytest.approx(0.5)
    assert coarse_error(CASES[0]) == coarse_error(CASES[0].varied("float64")) == 0


def test_peaks_are_of_the_products_type(monkeypatch):
    asked = []
    monkeypatch.setattr(Peaks, "flops", lambda self, dtype: asked.append(dtype) or 1e9)
    for dtype, precision in [("float32", "highest"), *AXES]:
        measure(CASES[0].varied(dtype, precision), [], threads=1, seconds=0.0)
    assert asked[::2] == asked[1::2] == ["float32", "bfloat16", "bfloat16", "bfloat16", "float16"]
