"""The dtypes and precisions of benchmarks, and the suffix that each gives a name."""

from __future__ import annotations

AXES = [("float32", "high"), ("float32", "medium"), ("bfloat16", "highest"), ("float16", "highest")]
SUFFIX = {"high": "high", "medium": "medium", "bfloat16": "bf16", "float16": "f16"}
