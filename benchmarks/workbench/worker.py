"""The measuring process, like `selfattn._bench.worker`, but with all peers of this package."""

from __future__ import annotations

import sys

from selfattn._bench.worker import main

if __name__ == "__main__":
    sys.exit(main())
