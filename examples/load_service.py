"""Runs service/load.py: see there.

.venv/bin/python examples/load_service.py --clients 16 --requests 400
"""

import sys

from service.load import main

if __name__ == "__main__":
    sys.exit(main())
