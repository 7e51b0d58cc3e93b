"""The instruction set in use, and the package's reports about itself."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import _info


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
    assert f"ValueError: SELFATTN_PARALLEL: '{name}' is not a back end of this build; available: " in printed
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
            {
                "isa",
                "isas",
                "threads",
                "threads_source",
                "affinity",
                "cgroup_quota",
                "parallel",
                "subnormals",
                "blas",
                "warnings",
            },
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


@pytest.mark.parametrize("reader", ["threadpoolctl", "itself"])
def test_the_blas_of_numpy_and_its_threads(run_python: Any, reader: str) -> None:
    if reader == "threadpoolctl":
        pytest.importorskip("threadpoolctl")
    code = f"""
        import sys
        if {reader == "itself"}: sys.modules['threadpoolctl'] = None
        import numpy as np
        import selfattn as sa
        print(np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"])
        print(*sa.show_runtime(mode="dicts")["blas"], sep="\\n")
    """
    build, *found = run_python(code, OPENBLAS_NUM_THREADS="1").splitlines()
    if "openblas" not in build or not sys.platform.startswith("linux"):
        pytest.skip("reads the functions of a loaded OpenBLAS")
    assert re.fullmatch(r"openblas \(1 thread, \w+\)", found[0])
    found = run_python(code, OPENBLAS_NUM_THREADS="2").splitlines()[1:]
    assert found[0].startswith("openblas (2 threads, ") or os.cpu_count() == 1


def test_settings_that_make_services_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = os.cpu_count() or 1
    monkeypatch.setattr(_info, "_processes", lambda: 1)
    assert _info._warnings(cpus, cpus) == []
    monkeypatch.setattr(_info, "_processes", lambda: cpus + 1)
    assert _info._warnings(1, 1)[0].startswith(f"{cpus + 1} processes x 1 threads (NumPy's BLAS: 1) exceed ")
    monkeypatch.setattr(_info, "_processes", lambda: 2)
    assert len(_info._warnings(1, cpus + 1)) == 1
    monkeypatch.setattr(_info, "_processes", lambda: 1)
    monkeypatch.setattr(_info, "_IMPORTED_IN", os.getpid() - 1)
    assert _info._warnings(1, 1) == []
    assert _info._warnings(1, 2)[0].startswith("a BLAS with 2 threads in a forked process")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
def test_processes_are_counted(run_python: Any) -> None:
    code = """
        import subprocess, sys
        from selfattn import _info
        ready = "import selfattn; print('ready', flush=True); input()"
        others = [
            subprocess.Popen([sys.executable, "-c", ready], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        for other in others:
            other.stdout.readline()
        print(_info._processes() >= 3)
        for other in others:
            other.communicate(b"\\n")
    """
    assert run_python(code).strip() == "True"
