"""What the scripts of this folder share: peers, grids of workloads, targets, pictures and tables, memory, whole models.

It extends `selfattn._bench`, the part of the benchmarks that users get with the package.
"""

from __future__ import annotations

from . import peers as peers  # makes them known, before any module looks for them
