"""Time a new token of a batch in a transformers model, with each attention implementation and cache.

Run `python benchmarks/hf_caches.py --help` for the options. Needs torch and transformers (extra `transformers`).
"""

from __future__ import annotations

import sys

from workbench.hf_caches import main

if __name__ == "__main__":
    sys.exit(main())
