"""Benchmarks: named workloads, peers to compare with, measuring and reporting.

`python -m selfattn bench` and `selftest` are thin layers over this package. The scripts in `benchmarks/` add to it
what lives there in `workbench`: more peers, grids of workloads with targets, memory, whole models.
Nothing here is imported by `import selfattn`.
"""

from __future__ import annotations
