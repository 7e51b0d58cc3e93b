"""The check of another library's version."""

from __future__ import annotations

import re
from types import ModuleType

# The lower bounds in pyproject.toml.
_LOWEST = {"torch": (2, 5), "transformers": (5, 15), "jax": (0, 6), "mpi4py": (4, 1)}


def check_version(library: ModuleType) -> None:
    """Raise an ImportError that names the needed version if the library is too old."""
    lowest = _LOWEST[library.__name__]
    if tuple(map(int, re.findall(r"\d+", library.__version__)[:2])) < lowest:
        needed = ".".join(map(str, lowest))
        raise ImportError(
            f"selfattn: {library.__name__} is {library.__version__}, but {needed} or newer is needed: "
            f'pip install "{library.__name__}>={needed}"'
        )
