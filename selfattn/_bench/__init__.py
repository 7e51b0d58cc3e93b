"""Benchmarks: named workloads, peers to compare with, measuring and reporting.

`python -m selfattn bench` and `selftest` are thin layers over this package. The package `workbench` in `benchmarks/`
extends it with more peers, grids of workloads with targets, memory measurements and whole models.
`import selfattn` does not import this package.
"""

from __future__ import annotations
