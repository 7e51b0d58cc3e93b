"""An HTTP service on selfattn; see app.py."""

import os

# NumPy's OpenBLAS reads this once, while it is loaded: modules of this package must come before NumPy. Its threads spin
# while they wait for each other, which makes several workers, or a worker and its clients, many times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
