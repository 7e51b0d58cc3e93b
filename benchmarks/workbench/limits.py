"""Limits selfattn and the peers' libraries to one instruction set."""

from __future__ import annotations

import os

import selfattn

# All AVX-512 extensions of the processor but not AMX, like selfattn's ISAs of that name.
_AVX512 = {
    "ATEN_CPU_CAPABILITY": "avx512",
    "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16",
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX512_BF16",
}
LIMITS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    },
    "avx512": _AVX512,
    "avx512_bf16": _AVX512,
}


def variables(isa: str) -> dict[str, str]:
    """Return the environment variables that limit a process.

    Raises
    ------
    ValueError
        If this machine lacks the instruction set.
    """
    if isa not in selfattn.isas():
        raise ValueError(f"bench: this machine has no {isa}, only {', '.join(selfattn.isas())}")
    return {**LIMITS[isa], "SELFATTN_ISA": isa}


def hold(isa: str) -> None:
    """Set the environment variables for the measuring processes; raises ValueError as `variables` does."""
    os.environ.update(variables(isa))
