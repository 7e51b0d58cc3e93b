"""The child processes of `test_guard_pages`: an access out of bounds ends them by a signal."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from guard_cases import (
    LENGTHS,
    LONG,
    NARROW,
    Case,
    attention_case,
    call,
    cases,
    gradient_case,
    layer_case,
    relative_case,
    relative_gradient_case,
    rope_case,
    term_cases,
)
from guarded import SIDES, Heap, Region, Side, shifted

import selfattn as sa
from selfattn import reference
from selfattn._rounding import rounding

FILL = 0xFF  # NaN, if a gap between an input's elements is read as an element
MARK = 0x5A  # fills the gaps of `out`, and must stay there
LAYOUTS = ("plain", "rows apart", "rows misaligned", "columns apart", "heads last", "backwards")
CAPACITY = 8 << 20


def strides_for(layout: str, x: Any) -> tuple[int, ...]:
    """Return strides in bytes; rows and elements do not overlap."""
    order = list(range(x.ndim))[::-1]
    if layout == "heads last" and x.ndim > 2:
        order[1], order[2] = order[2], order[1]
    steps, step = [0] * x.ndim, x.itemsize * (3 if layout == "columns apart" else 1)
    for place, axis in enumerate(order):
        steps[axis] = step
        step *= x.shape[axis]
        if place == 0 and layout.startswith("rows"):
            step += 3 * x.itemsize if layout == "rows apart" else 1
    return tuple(-s for s in steps) if layout == "backwards" else tuple(steps)


class Sweep:
    def __init__(self) -> None:
        self.regions: dict[str, Region] = {}
        self.heap = Heap()

    def place(self, case: Case, side: Side, layouts: dict[str, str]) -> tuple[dict[str, Any], Any]:
        placed, extent = {}, None
        for name, x in case.arrays.items():
            region = self.regions.setdefault(name, Region(CAPACITY))
            fill = MARK if name == "out" else FILL
            placed[name], everything = region.place(x, side, strides_for(layouts[name], x), fill)
            extent = everything if name == "out" else extent
        return placed, extent

    def run(self, case: Case, side: Side, layouts: dict[str, str]) -> tuple[Any, ...]:
        """Make the call on guarded memory; its result must be bit-identical to that on ordinary memory."""
        placed, out_extent = self.place(case, side, layouts)
        with self.heap.installed(side):
            results = call(case, placed)
        copies = tuple(np.array(result) for result in results)
        for x, y in zip(case.arrays, placed, strict=True):
            assert x == "out" or np.array_equal(case.arrays[x], placed[y]), f"{x} was changed"
        if out_extent is not None:
            assert results[0] is placed["out"]
            placed["out"][...] = np.frombuffer(bytes([MARK] * 8), placed["out"].dtype)[0]
            assert np.all(out_extent == MARK), "written between the elements of out"
        plain = call(case, {name: x.copy() for name, x in case.arrays.items()})
        assert len(plain) == len(copies)
        for wanted, found in zip(plain, copies, strict=True):
            assert np.array_equal(wanted, found, equal_nan=True), "differs from the result in ordinary memory"
        return copies


def compare(case: Case, out: Any) -> None:
    """Compare the result of an attention with the reference."""
    q, k, v, options = attention_arguments(case)
    named = ("causal", "window", "chunk", "softcap", "layout", "dropout", "seed")
    kept = {name: case.settings[name] for name in named if name in case.settings}
    exact = reference.attention(q, k, v, **options, **kept)
    largest = {
        name: float(np.max(abs(options[name].astype(np.float64)), initial=0))
        for name in ("bias", "alibi_slopes")
        if name in options
    }
    distance = 2 * max(LENGTHS + LONG)
    logits = exact.sigma + largest.get("bias", 0) + largest.get("alibi_slopes", 0) * distance
    unit = 2.0**-53 if out.dtype == np.float64 else 2.0**-24
    # A weight below the normal numbers may be lost; and the reference, in float64 itself, may err as well.
    computed_in = np.float64 if out.dtype == np.float64 else np.float32
    lost = float(np.finfo(computed_in).smallest_normal) * float(np.sum(abs(v.astype(np.float64))))
    of_values, of_scores = rounding(q, k, v, **options, **case.settings)
    relative = (16 + 4 * logits) * (unit + 2.0**-53) + of_values + exact.sigma * of_scores
    bound = relative * exact.magnitude + lost
    if out.dtype in NARROW:  # rounded once more, to a coarser type, with float16's smallest number as a limit
        bound = (abs(exact.out) + bound) * (2.0**-11 if out.dtype == np.float16 else 2.0**-8) + bound + 2.0**-25
    assert np.all(abs(out.astype(np.float64) - exact.out) <= bound), "inaccurate"


def attention_arguments(case: Case) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return q, k, v and the arrays among the options, without out."""
    q, k, v = (case.arrays[name] for name in "qkv")
    return q, k, v, {name: x for name, x in case.arrays.items() if name not in ("q", "k", "v", "out")}


def sweep(isa: str, seed: int) -> None:
    """Run every case on both sides; the file `case` tells which one was the last."""
    rng = np.random.default_rng(seed)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work = Sweep()
    met: Counter[str] = Counter()
    with sa.use_isa(isa):
        for case in cases(seed):
            for side in SIDES:
                layouts = {name: str(rng.choice(LAYOUTS)) for name in case.arrays}
                Path("case").write_text(f"{side} of the memory, {case}, {layouts}", encoding="utf8")
                out = work.run(case, side, layouts)[0]
                if case.kind == "attention":
                    compare(case, out)
                    q, k, v, options = attention_arguments(case)
                    plan = sa.explain(q, k, v, **options, **case.settings)
                    met[plan["kernel"]] += 1
                    met["ranges"] += plan["ranges"] > 1
                    met["threads"] += plan["threads"] > 1
                met[case.kind] += 1
        for case in term_cases(seed):
            for side in SIDES:
                for layout in LAYOUTS:
                    Path("case").write_text(f"{side} of the memory, {case}, {layout}", encoding="utf8")
                    work.run(case, side, dict.fromkeys(case.arrays, layout))
    assert work.heap.served > met["attention"] // 3, "NumPy did not allocate on the guarded heap"
    print(" ".join(f"{name}={count}" for name, count in sorted(met.items())))


def reach(isa: str) -> None:
    """Shift each operand and result over its border by one element, each in a child that must die."""
    rng = np.random.default_rng(5)
    work = Sweep()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with sa.use_isa(isa):
        for case in whole_cases(rng):
            for side in SIDES:
                for name, signal_name in reached(work, case, side):
                    print(case.kind, side, name, signal_name)


def reached(work: Sweep, case: Case, side: Side) -> Iterator[tuple[str, str]]:
    placed, _ = work.place(case, side, dict.fromkeys(case.arrays, "plain"))
    for name, x in placed.items():
        yield name, ending(partial(call, case, {**placed, name: shifted(x, side)}))
    with work.heap.installed(side):
        results = call(case, {name: x for name, x in placed.items() if name != "out"})
    for i, x in enumerate(results):
        yield f"result {i}", ending(shifted(x, side).tolist)


def whole_cases(rng: Any) -> Any:
    """Draw cases of every kind until every operand has occurred."""
    score = {"mask", "bias", "kv_lens", "kv_starts", "q_lens", "q_offset", "alibi_slopes", "sinks", "out"}
    layer = {"x", "w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o", "context", "positions"}
    for make, wanted, arguments in (
        (attention_case, score | {"q", "k", "v"}, (np.float32, 33, 17, 33)),
        (attention_case, {"q", "k", "v", "out"}, (np.float64, 33, 2, 33)),
        (attention_case, {"q", "k", "v", "out"}, (np.float16, 33, 2, 33)),
        (attention_case, {"q", "k", "v", "out"}, (NARROW[1], 33, 17, 33)),
        (layer_case, score | layer, (np.float64, 17)),
        (
            gradient_case,
            {"q", "k", "v", "grad_out", "result", "lse", "grad_lse", "grad_weights"},
            (np.float32, 33, 17, 33),
        ),
        (gradient_case, {"q", "k", "v", "grad_out", "result"}, (np.float16, 33, 17, 33)),
        (rope_case, {"x", "positions", "out"}, (np.float32, 40)),
        (relative_case, {"q", "k", "v", "r", "u", "w", "out"}, (np.float32, 33)),
        (relative_gradient_case, {"q", "k", "v", "r", "u", "w", "grad_out", "result", "lse"}, (np.float32, 33)),
    ):
        while wanted:
            case = make(rng, *arguments)
            if wanted & case.arrays.keys():
                wanted = wanted - case.arrays.keys()
                yield without_limits(case)


def without_limits(case: Case) -> Case:
    """Let every query see every key, so that each element of every operand is needed."""
    arrays = dict(case.arrays)
    arrays.update({name: np.ones_like(arrays[name]) for name in ("mask",) if name in arrays})
    for name, tokens in ("q_lens", "q"), ("kv_lens", "k"):
        if name in arrays:
            longest = case.arrays.get("context", case.arrays.get("x")) if case.kind == "layer" else case.arrays[tokens]
            lengths = longest.shape[-3 if case.settings.get("layout") == "bshd" else -2]
            lengths = case.arrays["x"].shape[1] if (case.kind, name) == ("layer", "q_lens") else lengths
            arrays[name] = np.full_like(arrays[name], lengths)
    if "kv_starts" in arrays:
        arrays["kv_starts"] = np.zeros_like(arrays["kv_starts"])
    settings = {name: x for name, x in case.settings.items() if name not in ("window", "chunk")}
    if case.kind != "rope":
        settings.update(causal=False, num_threads=1)
    if "wrt" in settings:
        settings["wrt"] = ("q", "k", "v")
    if "r" in arrays:
        arrays["r"], settings["r_origin"] = reached_distances(case)
    return Case(case.kind, arrays, settings)


def reached_distances(case: Case) -> tuple[Any, int]:
    """Return r and its origin such that the distances of the call reach both ends of r."""
    segment, length = case.arrays["q"].shape[-2], case.arrays["k"].shape[-2]
    r = case.arrays["r"][..., : length + segment - 1, :]
    least = max(r.shape[-2] - length, 1)
    return r, max(min(case.settings["r_origin"], segment - 1), least)


def ending(action: Callable[[], Any]) -> str:
    """Run `action` in a forked child; return the signal that ended it, or "none"."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "none"


def run(action: Callable[..., None], *arguments: Any) -> NoReturn:
    """Run `action` and exit at once: arrays of the guarded heap must not outlive its functions."""
    code = 1
    try:
        action(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
