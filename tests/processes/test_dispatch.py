"""The instruction set in use, and the package's reports about itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import selfattn as sa


def test_the_best_comes_first() -> None:
    names = [name for name in sa.isas() if name != "amx_emulated"]  # last, and never the default
    assert names[-1] == "portable"
    assert sa.active_isa() in names


@pytest.mark.parametrize("name", sa.isas())
def test_the_environment_chooses(run_python: Any, name: str) -> None:
    code = "import selfattn as sa; print(sa.active_isa(), sa.show_runtime(mode='dicts')['isa_source'])"
    assert run_python(code, SELFATTN_ISA=name).split() == [name, "SELFATTN_ISA"]


@pytest.mark.parametrize("name", ["sse9", "AVX2", "vax"])
def test_an_unknown_name_is_a_clear_error(run_python: Any, name: str) -> None:
    printed = run_python("import selfattn", expected_exit=1, SELFATTN_ISA=name)
    assert f"ValueError: SELFATTN_ISA: '{name}' is not an instruction set that this machine can run" in printed
    assert ", ".join(sa.isas()) in printed


@pytest.mark.parametrize("name", ["thread", "OpenMP", " serial"])
def test_an_unknown_back_end_is_a_clear_error(run_python: Any, name: str) -> None:
    printed = run_python("import selfattn", expected_exit=1, SELFATTN_PARALLEL=name)
    assert f"ValueError: SELFATTN_PARALLEL: '{name}' is not a back end of this build; it has " in printed
    assert "threads, serial" in printed


def test_empty_settings_are_none(run_python: Any) -> None:
    code = "import selfattn as sa; print(sa.active_isa(), sa.show_runtime(mode='dicts')['parallel'])"
    assert run_python(code, SELFATTN_ISA="", SELFATTN_PARALLEL="") == run_python(code)


def test_use_isa_returns_to_what_was() -> None:
    before = sa.active_isa()
    with sa.use_isa("portable"):
        assert sa.active_isa() == "portable"
        with pytest.raises(RuntimeError), sa.use_isa(before):
            raise RuntimeError
        assert sa.active_isa() == "portable"
    assert sa.active_isa() == before
    for unknown in ("mmx", "", None):
        with pytest.raises(ValueError, match=f"use_isa: name is {unknown!r}, but it must be one of "):
            sa.use_isa(unknown).__enter__()
    assert sa.active_isa() == before


def test_instruction_sets_agree(normal: Any) -> None:
    q, k, v = normal(2, 100, 32), normal(2, 300, 32), normal(2, 300, 32)
    results = []
    for name in sa.isas():
        with sa.use_isa(name):
            results.append(sa.attention(q, k, v, causal=True))
    for result in results[1:]:
        assert np.allclose(result, results[0], atol=1e-6)


def test_a_layer_keeps_the_set_it_was_made_for(normal: Any) -> None:
    w, x = normal(16, 16), normal(30, 16)
    with sa.use_isa("portable"):
        layer = sa.SelfAttention(w, w, w, num_heads=2)
        expected = layer(x)
    assert layer.isa == "portable"
    assert np.array_equal(layer(x), expected)


def test_self_description(capsys: pytest.CaptureFixture[str]) -> None:
    for show, names in (
        (sa.show_config, {"version", "compiler", "flags", "build_type", "openmp", "isas"}),
        (
            sa.show_runtime,
            {"isa", "isas", "threads", "threads_source", "affinity", "cgroup_quota", "parallel", "subnormals", "blas"},
        ),
    ):
        facts = show(mode="dicts")
        assert facts is not None
        assert names <= facts.keys()
        json.dumps(facts)
        assert show() is None
        printed = capsys.readouterr().out
        assert all(name in printed for name in names)
        with pytest.raises(ValueError, match="mode is 'xml'"):
            show(mode="xml")  # type: ignore[arg-type]
    runtime = sa.show_runtime(mode="dicts")
    assert runtime is not None
    assert runtime["subnormals"] is True
    assert runtime["threads"] == sa.get_num_threads()
    config = sa.show_config(mode="dicts")
    assert config is not None
    assert set(sa.isas()) <= set(config["isas"])
    assert config["version"] == sa.__version__


def test_the_specification_comes_with_the_package(run_python: Any) -> None:
    assert run_python("import selfattn as sa; print(sa.reference.attention.__name__)").strip() == "attention"


def test_the_blas_of_numpy_and_its_threads(run_python: Any) -> None:
    code = "import sys; {}; import selfattn as sa; print(*sa.show_runtime(mode='dicts')['blas'])"
    without = run_python(code.format("sys.modules['threadpoolctl'] = None"))
    assert without.strip().endswith("(threads: needs threadpoolctl)")
    config: Any = np.show_config(mode="dicts")
    assert config["Build Dependencies"]["blas"]["name"] in without
    pytest.importorskip("threadpoolctl")
    if "openblas" in without:
        assert "openblas (1 threads)" in run_python(code.format("pass"), OPENBLAS_NUM_THREADS="1")
