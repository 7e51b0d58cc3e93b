"""Benchmarks: named workloads, peers to compare with, measuring and reporting.

`python -m selfattn bench` and the scripts in `benchmarks/` are thin layers over this package.
Nothing here is imported by `import selfattn`.
"""

from __future__ import annotations
