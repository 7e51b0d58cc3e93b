"""Code shared by the benchmark scripts: peers, grids of workloads, targets, plots and tables, memory, whole models.

It extends `selfattn._bench`, the part of the benchmarks that is installed with the package.
"""

from __future__ import annotations

from . import peers as peers  # registers them before any module looks them up
