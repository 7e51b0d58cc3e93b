"""A copy of the project that is mutated, rebuilt and tested."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from table import HERE, ROOT, Mutant

# Every child process imports this before it finds an editable install of the project.
SITECUSTOMIZE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
"""
BUILD_SECONDS = 240
TEST_SECONDS = 600


class Sandbox:
    def __init__(self, folder: Path, *, matrix: bool) -> None:
        self.folder = folder
        self.matrix = matrix  # with this processor's kernels and emulated AMX
        self.build_folder = folder / "build"
        # Everything, because tests also run the programs of docs/ and examples/.
        unneeded = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.so")
        shutil.copytree(ROOT, folder, ignore=unneeded)
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf8")
        metadata = folder / "selfattn-0.dist-info"  # the package asks for its version
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: selfattn\nVersion: 0\n", encoding="utf8")

    def configure(self) -> None:
        pybind = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
        ).stdout.strip()
        defines = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_FLAGS_RELEASE": "-O1",  # compiling is most of the time
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": self.folder / "selfattn",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind,
        }
        if self.matrix:
            defines["SELFATTN_EMULATE_AMX"] = "ON"
        else:
            defines["CMAKE_PROJECT_INCLUDE"] = HERE / "portable_only.cmake"
        options = [f"-D{name}={value}" for name, value in defines.items()]
        command = ["cmake", "-G", "Ninja", "-B", self.build_folder, "-S", self.folder, *options]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def check_import(self) -> None:
        """Make sure that the tests import the copy, not an installed selfattn."""
        code = "from selfattn import _core; print(_core.__file__)"
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, env=self.environment(), cwd="/", check=True)
        if not found.stdout.startswith(str(self.folder)):
            raise RuntimeError(f"the tests would run with {found.stdout}")

    def build(self) -> str:
        """Rebuild what changed; return the compiler's complaint, or nothing."""
        command = ["cmake", "--build", str(self.build_folder)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        return "" if result.returncode == 0 else result.stdout + result.stderr

    def test(self, *places: Path) -> tuple[str, str]:
        """Run modules or folders of tests until one fails; return "passed", "failed" or "broken" and the last lines."""
        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--hypothesis-profile=mutants",
            "--no-header",
            "-rN",
            "--tb=line",
            "-o",
            "xfail_strict=false",
            "--rootdir",
            str(self.folder),
        ]
        options += ["-m", "matrix"] if self.matrix else []
        command = [sys.executable, "-m", "pytest", *options, *map(str, places)]
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TEST_SECONDS,
                cwd=self.folder / "tests",
                env=self.environment(),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "failed", f"still running after {TEST_SECONDS} s"
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith((str(self.folder), "E "))), lines[-1] if lines else "")
        if result.returncode < 0:
            return "failed", f"signal {-result.returncode}"
        if result.returncode in (0, 1):
            return ("passed", "failed")[result.returncode], reason
        return "broken", result.stdout + result.stderr

    def run(self, mutant: Mutant) -> tuple[str, str]:
        """Return "killed", "survived", "does not compile" or "broken", and what was seen."""
        file = self.folder / mutant.file
        original = file.read_text(encoding="utf8")
        file.write_text(original.replace(mutant.old, mutant.new), encoding="utf8")
        try:
            if complaint := self.build():
                return "does not compile", complaint
            module = mutant.module(self.folder)
            verdict, seen = self.test(module, module.parent)
        finally:
            file.write_text(original, encoding="utf8")
        return {"passed": "survived", "failed": "killed"}.get(verdict, verdict), seen
