"""Scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from places import BENCHMARKS


def load_script(name: str) -> ModuleType:
    """Load a script anew, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
