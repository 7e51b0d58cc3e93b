"""The list of commands: `nox -l` shows it, `nox -s tests` runs one."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import nox

sys.path.append(str(Path(__file__).parent))
from nox_steps import (
    EMULATED,
    PINNED,
    SANITIZED,
    WITHOUT_OPENMP,
    build_native,
    build_package,
    build_site,
    build_wheels,
    check_release,
    clang_compiler,
    cover_core,
    install_lowest,
    install_tests,
    run_fuzzers,
    run_native,
    sanitizer_runtimes,
    unpinned,
    wheel,
)

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"

CPP = [str(p) for folder in ("csrc", "tests") for p in sorted(Path(folder).rglob("*.*")) if p.suffix in {".h", ".cpp"}]
# Pinned: another version would format differently.
LINTERS = ["ruff==0.17.5", "clang-format==23.1.5", "mypy==2.4.1", "numpy>=2"]
TORCH = "torch==2.13.0"  # the CPU build; a bare "torch" may bring CUDA
# Libraries that tests of examples and integrations compare with.
PEERS = [TORCH, "transformers", "accelerate", "ctranslate2", "jax", "onnx", "onnxruntime"]
# Tests that call the core within the pytest process.
CALLS = ["core", "gradients", "caches", "layers", "compat"]
# Modules of selfattn/ that check users' arguments: tests must cover every line of them.
CHECKS = ["arguments", "attention", "keywords", "layer", "layer_inputs", "rope", "self_attention", "states", "weights"]
# Packages whose lower bound in pyproject.toml is tested, and the tests that use them. .ci/run tests the newest
# versions that the project knows, since .ci/constraints.txt pins them.
BOUNDED = {
    "numpy": ["core", "gradients", "compat", "layers"],
    "torch": ["integrations", "compat"],
    "transformers": ["integrations"],
    "jax": ["integrations"],
    "ml_dtypes": ["compat", "layers", "caches"],
    "mpi4py": ["distributed"],
    "matplotlib": ["tools", "benchmarks"],
}


def folders(names: list[str]) -> list[str]:
    return [f"tests/{name}" for name in names]


@nox.session
def lint(session: nox.Session) -> None:
    """Check formatting, static rules and types."""
    session.install(*LINTERS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("clang-format", "--dry-run", "--Werror", *CPP)
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the whole suite; tests of the core run on every instruction set of this machine."""
    install_tests(session)
    session.run("pytest", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """Run the suite with the peers installed."""
    session.install(*PEERS, "openvino")
    install_tests(session)
    session.install(".[models]")
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation's site in site/, warnings as errors; check links, blocks of code and examples."""
    session.install(*PEERS)
    build_site(session)


@nox.session
@nox.parametrize("package", list(BOUNDED))
def versions(session: nox.Session, package: str) -> None:
    """Test with the lowest version of a package that pyproject.toml accepts."""
    session.env["PIP_CONSTRAINT"] = unpinned(session, list(BOUNDED))
    wanted = install_lowest(session, package)
    torch = [TORCH] if package == "transformers" else []
    # In one command, so that pip finds compatible versions.
    session.install("--upgrade", f"{wheel(session)}[test]", wanted, *torch)
    session.run("python", "-c", f"import {package}; print({package}.__name__, {package}.__version__)")
    # Old packages use features that other packages have since deprecated.
    session.run("pytest", "-n", "2", "-W", "ignore::DeprecationWarning", *folders(BOUNDED[package]), *session.posargs)


@nox.session
def native(session: nox.Session) -> None:
    """Test the core without Python; options of ctest after `--`."""
    run_native(session, build_native(session, "-DCMAKE_BUILD_TYPE=Release", f"-D{EMULATED}"), *session.posargs)


@nox.session
def neon(session: nox.Session) -> None:
    """Test the core on AArch64: cross-compiled, under emulation."""
    missing = [name for name in ("aarch64-linux-gnu-g++", "qemu-aarch64") if not shutil.which(name)]
    if missing:
        session.skip(f"needs {' and '.join(missing)}")
    settings = ["-DCMAKE_BUILD_TYPE=Release", f"-D{EMULATED}", "--toolchain", "cmake/aarch64-linux-gnu.cmake"]
    run_native(session, build_native(session, *settings), *session.posargs)


@nox.session
def targets(session: nox.Session) -> None:
    """Compare speed with all peers and with targets, and memory with its limits; options after `--`."""
    session.install(TORCH, "openvino", "jax")
    session.install(".[bench]")
    session.run("python", "benchmarks/targets.py", *session.posargs, success_codes=[0, 1])
    session.run("python", "benchmarks/memory.py")


@nox.session
@nox.parametrize("script", ["attention", "caches", "apart", "neighbours", "relative"])
def bench(session: nox.Session, script: str) -> None:
    """Compare with the peers; give the benchmark's options after `--`."""
    session.install(TORCH)
    session.install(".[bench]")
    session.run("python", f"benchmarks/{script}.py", *session.posargs)


@nox.session
def asan(session: nox.Session) -> None:
    """Run CALLS and safety under AddressSanitizer and UndefinedBehaviorSanitizer (GCC); other folders after `--`.

    Other folders that use the core are left out. `processes`, `distributed`, `tools` and `examples` start child
    processes, each of which would need the preloaded runtime; some preload a library of their own or measure memory.
    `integrations` and `examples` load PyTorch, JAX and others, in which sanitizers report findings of their own. And
    time is short: all parts of `deep` together may take 75 minutes.
    """
    settings = ["-Ccmake.define.SELFATTN_SANITIZE=address,undefined", "-Ccmake.build-type=RelWithDebInfo"]
    # -O1: with sanitizers, -O2 would take minutes longer to compile.
    settings += [f"-Ccmake.define.{EMULATED}", "-Ccmake.define.CMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1"]
    install_tests(session, *settings)
    environment = SANITIZED | {"LD_PRELOAD": " ".join(sanitizer_runtimes()), "SELFATTN_HOSTILE_CALLS": "12000"}
    running = ["-n", "2", "-p", "no:cacheprovider", "-m", "not unsanitized"]
    session.run("pytest", *running, *(session.posargs or folders([*CALLS, "safety"])), env=environment)


@nox.session
def tsan(session: nox.Session) -> None:
    """Run calls from many threads under ThreadSanitizer; give the number of rounds after `--`."""
    # Debug symbols for readable reports. ThreadSanitizer would report libgomp's barriers as races.
    settings = ["-DSELFATTN_SANITIZE=thread", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-D{WITHOUT_OPENMP}"]
    build = build_native(session, *settings, targets=("stress_threads",))
    program = str(build / "tests" / "native" / "stress_threads")
    environment = {"TSAN_OPTIONS": "halt_on_error=1"}
    session.run(program, *(session.posargs or ["10"]), env=environment, external=True)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Run the tests of `native` and libFuzzer under both sanitizers of `asan` (Clang); number of runs after `--`."""
    session.env["CXX"] = clang_compiler(session)
    session.env.update(SANITIZED)
    # A debug build keeps assertions enabled.
    settings = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O2 -fno-sanitize-recover=all"]
    settings += ["-DSELFATTN_SANITIZE=fuzzer-no-link,address,undefined", f"-D{WITHOUT_OPENMP}"]
    build = build_native(session, *settings)
    run_native(session, build)
    run_fuzzers(session, build, int((session.posargs or ["200000"])[0]))


@nox.session
def mutants(session: nox.Session) -> None:
    """Check that tests notice when one line at a time is broken; options of tests/mutants/run.py after `--`."""
    session.install("numpy", "pybind11>=3,<4", "cmake", "ninja", "pytest", "hypothesis", "ml_dtypes")
    session.run("python", "tests/mutants/run.py", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Check line coverage: 95 % of C++ and Python, 100 % of the code that checks arguments, hides keys and merges."""
    if shutil.which("gcov") is None:
        session.skip("needs gcc and gcov")
    session.install("coverage>=7.10", "gcovr>=8")
    build = Path(session.create_tmp()).resolve() / "build"
    shutil.rmtree(build, ignore_errors=True)
    # Atomic updates, since counts lost between threads would make derived counts negative.
    flags = "-O1 --coverage -fprofile-update=atomic"
    settings = (f"CMAKE_CXX_FLAGS_RELEASE={flags}", EMULATED)
    install_tests(session, f"-Cbuild-dir={build}", *(f"-Ccmake.define.{setting}" for setting in settings))
    session.env["COVERAGE_FILE"] = str(build / "python")
    tests = [str(Path(session.bin) / "pytest"), "-q", "-n", "2", "-m", "not uncounted", *session.posargs]
    tests += folders([*CALLS, "distributed", "processes", "tools", "benchmarks"])
    session.run("coverage", "run", *tests)
    session.run("coverage", "combine", "-q")
    session.run("coverage", "report", "--skip-covered", "--fail-under=95")
    checks = ",".join(f"*/selfattn/_{name}.py" for name in CHECKS)
    session.run("coverage", "report", f"--include={checks}", "--fail-under=100")
    cover_core(session, build)


@nox.session
def tidy(session: nox.Session) -> None:
    """Run clang-tidy on the core and the bindings."""
    session.install("clang-tidy==23.1.4", "cmake", "ninja", "pybind11>=3,<4")
    build = Path(session.create_tmp()) / "tidy"
    pybind = session.run("python", "-m", "pybind11", "--cmakedir", silent=True)
    # Without OpenMP, since the header belongs to another compiler.
    defines = [f"-Dpybind11_DIR={str(pybind).strip()}", f"-D{WITHOUT_OPENMP}"]
    session.run("cmake", "-G", "Ninja", "-B", str(build), "-S", ".", *defines)
    # One process per CPU. Kernels are left out: each would be checked once per instruction set.
    session.run("run-clang-tidy.py", "-quiet", "-p", str(build), r"/csrc/(?!kernels/isa_)")


@nox.session
def clang(session: nox.Session) -> None:
    """Build with Clang, with warnings as errors and the std::thread back end, and run the tests."""
    session.env["CXX"] = clang_compiler(session)
    defines = ["-Ccmake.define.SELFATTN_WERROR=ON", f"-Ccmake.define.{WITHOUT_OPENMP}"]
    install_tests(session, *defines)
    session.run("pytest", "-n", "2", *folders(["layers", "caches"]), *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build an sdist and a wheel from it; check both, write the SBOM, and run the wheel's self-test."""
    build_package(session)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build and test a wheel for each Python with cibuildwheel, in wheelhouse/; an sdist or options after `--`."""
    build_wheels(session)


@nox.session
def release(session: nox.Session) -> None:
    """Check the sdist and the wheels named after `--`, and write their SBOM, sbom.cdx.json."""
    check_release(session, [Path(name) for name in session.posargs], Path("sbom.cdx.json"))


# Sessions that .ci/run leaves out or runs only in part, with options. Both sanitizers and coverage use a build with
# AMX emulated, so that tests run on every instruction set of x86-64; `neon` tests the one of AArch64. The sample of
# mutants is for calls without a base revision, and for changes in folders that have no mutants.
DEEP = {
    "asan": [],
    "clang": [],
    "mutants": ["--jobs", "2", "--sample", "7"],
    "coverage": [],
    "fuzz": ["15000"],
    "neon": [],
}


@nox.session(venv_backend="none")
def deep(session: nox.Session) -> None:
    """Run the sessions of DEEP and report which passed; give the base revision of your changes after `--`."""
    verdicts = {}
    for name, options in DEEP.items():
        report = Path(session.create_tmp()) / f"{name}.json"
        if name == "mutants" and session.posargs:
            options = [*options, "--changed", *session.posargs]
        report.unlink(missing_ok=True)
        start = time.monotonic()
        nox_itself = [sys.executable, "-m", "nox", "--no-error-on-external-run"]
        command = [*nox_itself, "--report", str(report.resolve()), "-s", name]
        session.run(*command, "--", *options, env=PINNED, external=True, success_codes=range(256))
        for part in json.loads(report.read_text(encoding="utf8"))["sessions"]:
            # Newer versions of nox list the names of a session.
            signature = part["signature"] if "signature" in part else part["signatures"][0]
            verdicts[signature] = part["result"]
        session.log(f"{name}: {(time.monotonic() - start) / 60:.1f} minutes")
    for part, verdict in verdicts.items():
        session.log(f"{verdict:8} {part}")
    if not set(verdicts.values()) <= {"success", "skipped"}:
        session.error("a part failed")
