"""Time whole transformers models with selfattn and with the attention they use otherwise, per sequence length.

Run `python benchmarks/huggingface.py --help` for the options. Needs torch and transformers (extra `transformers`).
"""

from __future__ import annotations

import sys

from workbench.hf_command import main

if __name__ == "__main__":
    sys.exit(main())
