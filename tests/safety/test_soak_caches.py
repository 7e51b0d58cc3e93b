"""Long use of caches: many calls, correct results to the end, and no memory leaks."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from places import SUPPORT

START = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import soak_caches; "
OPERATIONS = int(os.environ.get("SELFATTN_CACHE_OPERATIONS", "100000"))


@pytest.mark.one_isa
@pytest.mark.unsanitized
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' own accounts")
def test_many_calls_leave_no_memory_behind(run_python: Any) -> None:
    assert int(run_python(START + f"soak_caches.main({OPERATIONS})")) < 1 << 20
