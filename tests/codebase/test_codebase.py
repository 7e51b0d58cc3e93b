"""Rules of the codebase: which file may include what, and how the core is divided."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest
from places import ROOT

CSRC = ROOT / "csrc"

# (files, what their includes must match, what they must not match)
INCLUDE_RULES = [
    ("kernels/*", r'"(simd|kernels)/|"(arithmetic|dtype)\.h"|<c(stdint|stddef|string)>|SELFATTN_VEC', None),
    ("simd/*", r'<((immintrin|arm_neon)\.h|c(stdint|string))>|SELFATTN_VEC|"simd/', None),
    ("arithmetic.h", r"<c(stddef|stdint)>", None),
    ("dtype.h", r'<cstdint>|"arithmetic\.h"', None),
    ("problem.h", r'<|"(arithmetic|attention_options|tensor_view)\.h"', r"immintrin|arm_neon|pybind11"),
    ("tensor_view.h", r'<|"dtype\.h"', r"immintrin|arm_neon|pybind11"),
    ("plan.*", r'<|"(plan|thread_memory|problem|kernels/kernel_set)\.h"', r"immintrin|arm_neon|chrono|<thread>|omp\.h"),
    (
        "thread_memory.*",
        r'<|"(thread_memory|plan|distance_terms|key_mass|arithmetic|carver)\.h"',
        r"immintrin|arm_neon|chrono|<thread>|omp\.h",
    ),
    ("registry.cpp", None, r"simd/|kernels/(?!kernel_set)"),
    ("bindings/*", None, r"simd/|kernels/(?!kernel_set)"),
    ("*.*", None, r"Python\.h|pybind11|bindings/|simd/(?!narrow)|kernels/(?!kernel_set|scratch)"),
]


def includes(file: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s+(\S+)", file.read_text(encoding="utf8"), flags=re.M)


@pytest.mark.parametrize(("pattern", "allowed", "forbidden"), INCLUDE_RULES)
def test_include_rules(pattern: str, allowed: str | None, forbidden: str | None) -> None:
    files = [f for f in CSRC.glob(pattern) if f.suffix in {".h", ".cpp"}]
    assert files
    for file in files:
        for name in includes(file):
            where = f"{file.relative_to(ROOT)} includes {name}"
            assert allowed is None or re.search(allowed, name), where
            assert forbidden is None or not re.search(forbidden, name), where


# Each includes those to its right, directly or not, and none to its left.
ORDER = ["layer", "attend", "plan", "kernels/kernel_set"]


def all_includes(file: Path) -> set[Path]:
    """Return the headers of the core that a file includes, directly or not."""
    found: set[Path] = set()
    left = [file]
    while left:
        direct = {CSRC / name.strip('"') for name in includes(left.pop()) if name.startswith('"')}
        left += direct - found
        found |= direct
    return found


@pytest.mark.parametrize(("left", "right"), list(itertools.combinations(ORDER, 2)))
def test_includes_go_one_way(left: str, right: str) -> None:
    assert CSRC / f"{right}.h" in all_includes(CSRC / f"{left}.h") | all_includes(CSRC / f"{left}.cpp")
    sources = [f for f in (CSRC / f"{right}.h", CSRC / f"{right}.cpp") if f.exists()]
    assert not [f for f in sources if CSRC / f"{left}.h" in all_includes(f)]


def test_openmp_is_known_in_one_place() -> None:
    users = {f.name for f in CSRC.rglob("*.[ch]*") if re.search(r"omp\.h|#pragma omp", f.read_text(encoding="utf8"))}
    assert users == {"parallel.cpp"}


def test_kernels_neither_throw_nor_allocate() -> None:
    for file in (CSRC / "kernels").iterdir():
        text = re.sub(r"//.*", "", file.read_text(encoding="utf8"))
        assert not re.search(
            r"\bthrow\b|\bnew\b|\bmalloc\b|std::vector|printf|\bstatic\s+(?!const|\w+[^;]*\()", text
        ), file


def test_vector_headers_offer_the_same_operations() -> None:
    # A missing one would not compile; this also keeps them in the same order.
    def operations(file: Path) -> list[str]:
        names = re.findall(r"^inline .*?(\w+|operator.{1,2})\(", file.read_text(encoding="utf8"), flags=re.M)
        return [name for name in dict.fromkeys(names) if not name.startswith("first_lanes")]

    headers = {f.stem: operations(f) for f in (CSRC / "simd").glob("vec_*.h")}
    assert len(headers) >= 4
    expected = headers["vec_avx512"]
    assert len(expected) > 25
    for name, found in headers.items():
        extends = re.search(
            r'^#include "simd/vec_', (CSRC / "simd" / f"{name}.h").read_text(encoding="utf8"), flags=re.M
        )
        if extends:
            assert not set(found) & set(expected), name
        elif name == "vec_portable":  # its operations are in another order
            assert sorted(found) == sorted(expected), name
        else:
            assert found == expected, name


def test_every_isa_has_its_files() -> None:
    isas = re.findall(r"^\s*add_isa\((\w+)", (ROOT / "CMakeLists.txt").read_text(encoding="utf8"), re.MULTILINE)
    for folder, pattern in (("kernels", "isa_{}.cpp"), ("simd", "vec_{}.h")):
        expected = {pattern.format(name) for name in isas}
        assert {f.name for f in (CSRC / folder).glob(pattern.format("*"))} == expected


def test_baseline_objects_hold_no_wide_vectors() -> None:
    # Only isa_<name>.cpp gets instruction set flags: no other target may name one.
    for file in (ROOT / "CMakeLists.txt", *sorted((ROOT / "cmake").iterdir())):
        for line in file.read_text(encoding="utf8").splitlines():
            if re.search(r"-m(avx|fma|arch)", line):
                assert line.lstrip().startswith("add_isa("), f"{file.name}: {line}"
    assert "-ffast-math" not in (ROOT / "cmake" / "isa.cmake").read_text(encoding="utf8")


def test_stub_and_module_agree() -> None:
    from selfattn import _core

    text = (ROOT / "selfattn" / "_core.pyi").read_text(encoding="utf8")
    # Aliases of types are for checkers alone.
    stubbed = set(re.findall(r"^(?:def |class )?(\w+)(?:\(|:(?! TypeAlias))", text, flags=re.M))
    defined = {name for name in dir(_core) if not name.startswith("_")}
    assert stubbed == defined


def test_errors_of_the_core_keep_the_names_in_their_messages() -> None:
    """`refuse` in message.h throws them; others tell of environment variables, or of wrong use of `_core`."""
    others = re.compile(r"throw (std::invalid_argument|py::(type|value)_error)")
    found = {f.name for f in CSRC.rglob("*.[ch]*") if others.search(f.read_text(encoding="utf8"))}
    assert found == {"arrays.cpp", "parallel.cpp", "record.h", "registry.cpp"}


def test_errors_about_arguments_keep_the_names_in_their_messages() -> None:
    """`refusal` makes them. The others are about something that is no argument of the function that they name.

    `compat` and `integrations` are not looked at: they name their own arguments.
    """
    others = {
        "_copying": 2,  # a pickle
        "_evict": 2,  # a cache with a window; too few pages
        "_feed_forward": 1,  # a pickle
        "_idle": 1,  # the missing core
        "_immutable": 2,  # attributes
        "_keywords": 1,  # an unknown keyword
        "_layer": 1,  # a pickle
        "_ledger": 1,  # the memory of a cache
        "_linear": 1,  # a pickle
        "_lock": 1,  # no memory
        "_mask_nodes": 2,  # operators, and the conversion to an array, which have no named arguments
        "_store": 1,  # a missing package
        "_streaming": 1,  # a pickle
    }
    found: dict[str, int] = {}
    for file in (ROOT / "selfattn").glob("_[a-z]*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
            if isinstance(node, ast.Raise) and node.exc and re.match(r"[A-Z]\w+Error\(", ast.unparse(node.exc)):
                found[file.stem] = found.get(file.stem, 0) + 1
    del found["_info"]  # as NumPy's show_config
    assert found == others
