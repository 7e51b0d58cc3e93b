"""The child process of `test_hostile`."""

from __future__ import annotations

import faulthandler
import itertools
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hostile_arrays import INPUTS, OUTPUTS
from hostile_calls import make

import selfattn as sa

DOCUMENTED = (TypeError, ValueError, MemoryError, BufferError)


def limit_memory(extra: int) -> None:
    """Make every allocation of `extra` bytes fail, whatever the system would grant."""
    mapped = int(Path("/proc/self/statm").read_text(encoding="utf8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra, mapped + extra))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf8").split()[1]) * resource.getpagesize()


class Runner:
    def __init__(self) -> None:
        self.inputs, self.outputs = INPUTS.copy(), OUTPUTS.copy()
        self.counts: Counter[str] = Counter()

    def restore(self) -> None:
        INPUTS[...] = self.inputs
        OUTPUTS[...] = self.outputs

    def run(self, seed: int, index: int) -> None:
        call = make(seed, index)
        self.restore()
        try:
            call.function(*call.positional, **call.named)
            self.counts["done"] += 1
            out = call.named.get("out")
            assert not isinstance(out, np.ndarray) or out.flags.writeable or call.function is sa.explain
            written = INPUTS if isinstance(out, np.ndarray) and np.may_share_memory(out, INPUTS) else OUTPUTS
            same = np.array_equal(*((OUTPUTS, self.outputs) if written is INPUTS else (INPUTS, self.inputs)))
        except DOCUMENTED as error:
            self.counts[type(error).__name__] += 1
            same = np.array_equal(INPUTS, self.inputs) and np.array_equal(OUTPUTS, self.outputs)
        except BaseException as error:
            raise AssertionError(f"call {seed} {index}: {call}: {error!r}") from error
        assert same, f"call {seed} {index} changed memory: {call}"


def many(seed: int, count: int) -> None:
    """Make the calls and print how they ended."""
    faulthandler.dump_traceback_later(80, exit=True)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    limit_memory(2 << 30)
    runner = Runner()
    with open("case", "w", encoding="utf8") as case:
        for index in range(count):
            case.seek(0)
            case.write(f"{seed} {index}\n")
            case.flush()
            runner.run(seed, index)
            if index % 20_000 == 0:
                faulthandler.dump_traceback_later(80, exit=True)
    print(dict(runner.counts))


def grow(seed: int, count: int) -> None:
    """Make the same calls again and again; print the smallest growth of the process from one time to the next.

    A leak adds memory each time. The allocator may take memory the first few times and keep it.
    """
    warnings.simplefilter("ignore")
    limit_memory(2 << 30)
    runner = Runner()
    sizes = []
    for _ in range(9):
        for index in range(count):
            runner.run(seed, index)
        sizes.append(resident())
    print(min(after - before for before, after in itertools.pairwise(sizes[1:])))


def show(seed: int, index: int) -> Any:
    """Print one call, to examine a failure."""
    print(make(seed, index), file=sys.stderr)
