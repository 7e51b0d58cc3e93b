"""Hypothesis: gradients for random shapes, strides and options, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from gradient_bounds import Comparison
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import checked, problems

import selfattn as sa


@settings(checked, max_examples=40)
@given(problems(), st.booleans(), st.booleans(), st.sampled_from([None, 1, 2]), st.integers(0, 3))
def test_any_problem(
    isa: str, problem: Any, rounded: bool, all_results: bool, threads: int | None, with_table: int
) -> None:
    (q, k, v), options = problem
    rng = np.random.default_rng(q.shape[-2] * 1000 + k.shape[-2])
    if with_table == 0:
        options["t5"] = sa.T5Bias(rng.standard_normal((8, q.shape[1])), max_distance=30)
    comparison = Comparison(q, k, v, rng, all_results, num_threads=threads, **options)
    beyond = {name: share for name, share in comparison.shares(rounded).items() if not share <= 1}
    assert not beyond
