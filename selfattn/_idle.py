"""Loads the core so that its idle threads soon sleep.

GCC's OpenMP runtime lets threads that wait for the next parallel region spin for some 5 ms. NumPy's matrix products
do the same with threads of their own, and two threads that spin on one core take turns in slices of milliseconds: an
attention call behind ``X @ W`` took many times as long as alone (`benchmarks/neighbours.py`). A thread that sleeps
gets the core at once. The runtime reads its settings from the environment while it is being loaded, and only then; who
sets one is heard.
"""

from __future__ import annotations

import os

_SPIN = "GOMP_SPINCOUNT"
_TURNS = "2000"  # some 30 microseconds: calls that follow one another at once find the team awake

if _SPIN in os.environ or "OMP_WAIT_POLICY" in os.environ:
    from . import _core as _core
else:
    os.environ[_SPIN] = _TURNS
    try:
        from . import _core as _core
    finally:
        del os.environ[_SPIN]
