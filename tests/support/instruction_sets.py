"""Which instruction sets a test runs on."""

from __future__ import annotations

import numpy as np
import pytest
from places import ROOT

KERNELS = ROOT / "csrc" / "kernels"
KNOWN_ISAS = sorted(file.stem.removeprefix("isa_") for file in KERNELS.glob("isa_*.cpp"))
# Instruction sets that differ from AVX-512 where 16-bit numbers are multiplied, and where precision is below "highest".
EXTENSIONS = {"avx512_bf16", "amx", "amx_emulated"}
WIDE = {"float32", "float64"}
# Folders of tests that call the core in the pytest process, so that results may depend on kernels.
ON_EVERY_ISA = ["core", "gradients", "caches", "layers", "compat", "safety"]


def lists_isas(test: pytest.Item) -> bool:
    """Whether a test has its own list of instruction sets."""
    lists = [mark.args[0] for mark in test.iter_markers("parametrize")]
    return any("isa" in (names.split(",") if isinstance(names, str) else names) for names in lists)


def is_marked(test: pytest.Item) -> bool:
    """Whether a test says that one instruction set is enough."""
    return test.get_closest_marker("one_isa") is not None


def types_of(item: pytest.Item) -> set[str]:
    """Return the types that a run of a test says it uses."""
    call = getattr(item, "callspec", None)
    dtype = None if call is None else call.params.get("dtype")
    types = set() if dtype is None else {dtype if isinstance(dtype, str) else np.dtype(dtype).name}
    for mark in item.iter_markers("dtypes"):
        types |= set(mark.args)
    return types


def repeats_avx512(item: pytest.Item) -> bool:
    """Whether a test on an extension of AVX-512 would only repeat kernels that it runs on AVX-512."""
    call = getattr(item, "callspec", None)
    if call is None or call.params.get("isa") not in EXTENSIONS:
        return False
    types = types_of(item)
    return bool(types) and types <= WIDE and call.params.get("precision", "highest") == "highest"
