"""Tests whose results may depend on kernels run on every instruction set, or say why not."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import defaultdict

from instruction_sets import EXTENSIONS, ON_EVERY_ISA
from places import ROOT, TESTS

import selfattn

# Prints for each run of a test: the test, its instruction set, whether it is marked, whether it has a list of its own,
# its types and its precision.
COLLECT = """
import json, sys
import pytest

class Printer:
    def pytest_collection_finish(self, session):
        from instruction_sets import is_marked, lists_isas, types_of
        for item in session.items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            test, isa, precision = item.nodeid.split("[")[0], parameters.get("isa"), parameters.get("precision")
            run = [test, isa, is_marked(item), lists_isas(item), sorted(types_of(item)), precision]
            print(json.dumps(run), file=sys.stderr)  # pytest itself prints to stdout

sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Printer()]))
"""


def test_tests_run_on_every_instruction_set_or_say_why_not() -> None:
    command = [sys.executable, "-c", COLLECT, *(str(TESTS / name) for name in ON_EVERY_ISA)]
    # Not in ROOT, where Python would import the sources, which may lack the core.
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TESTS).stderr
    found: dict[tuple[str, bool, bool, bool], set[str | None]] = defaultdict(set)
    for line in printed.splitlines():
        test, isa, marked, lists, types, precision = json.loads(line)
        # Not repeats_avx512, which this test checks: the runs that an extension of AVX-512 would only repeat.
        wide = types != [] and set(types) <= {"float32", "float64"} and precision in (None, "highest")
        found[test, marked, lists, wide].add(isa)
    assert len(found) > 500
    for (test, marked, lists, wide), isas in found.items():
        if marked:
            assert isas == {None}, f"{test} is marked one_isa, but takes isa"
        elif not lists:
            missing = set(selfattn.isas()) - (EXTENSIONS if wide else set()) - isas
            assert not missing, f"{test} does not run on {', '.join(sorted(missing))}, but is not marked one_isa"


def test_tests_that_call_the_core_have_folders_of_this_rule() -> None:
    for line in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf8")).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "CALLS":
            assert {*ast.literal_eval(line.value), "safety"} == set(ON_EVERY_ISA)
            break
    else:
        raise AssertionError("noxfile.py has no CALLS")
