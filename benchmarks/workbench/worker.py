"""The process that measures, as `selfattn._bench.worker`, with all peers of this package."""

from __future__ import annotations

import sys

from selfattn._bench.worker import main

if __name__ == "__main__":
    sys.exit(main())
