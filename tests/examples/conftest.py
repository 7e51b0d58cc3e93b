"""Fixtures that several test modules of examples share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from places import EXAMPLES
from service_process import UVICORN, Server, serving


@pytest.fixture(scope="session")
def load_example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of examples/, whose modules import one another as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run the example's HTTP service under uvicorn."""
    if importlib.util.find_spec("uvicorn") is None:
        pytest.skip("uvicorn is not installed")
    with serving(tmp_path_factory.mktemp("server"), *UVICORN) as found:
        yield found
