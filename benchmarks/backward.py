"""Compare gradients with PyTorch's, and options with the same call without them.

    python benchmarks/backward.py --threads 1 2

Results are compared before anything is timed. Rounds are interleaved in one process; medians are printed. The fraction
of the peak counts the five products of the visible pairs. The peak is that of the unit that multiplies, and is measured
next to each row. With several numbers of threads, the last tables give the times with the first relative to the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import selfattn as sa
from selfattn._bench.timing import Peaks, Quartiles, interleave, ratios

Runs = dict[str, Callable[[], Any]]
COLUMNS = "batch, heads, KV heads, length, dim, causal"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}  # of the largest element


class Shape(NamedTuple):
    """A workload of self-attention."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    dim: int
    causal: bool

    @property
    def flops(self) -> float:
        """The operations of the five products of the visible pairs."""
        pairs = self.length * (self.length + 1) / 2 if self.causal else self.length**2
        return 10.0 * self.batch * self.heads * pairs * self.dim


SHAPES = [
    Shape(4, 12, 12, 128, 64, False),
    Shape(4, 12, 12, 512, 64, False),
    Shape(4, 12, 12, 512, 64, True),
    Shape(1, 12, 12, 1024, 64, False),
    Shape(1, 12, 12, 1024, 64, True),
    Shape(1, 16, 4, 1024, 128, True),
    Shape(1, 8, 8, 2048, 64, False),
    Shape(1, 8, 2, 2048, 64, True),
    Shape(1, 8, 8, 2048, 128, True),
    Shape(1, 4, 4, 4096, 64, False),
    Shape(1, 2, 2, 4096, 64, False),
    Shape(1, 2, 2, 4096, 128, True),
    Shape(1, 1, 1, 4096, 64, False),
]
OPTIONS = Shape(1, 12, 12, 1024, 64, False)


class Operands(NamedTuple):
    """The operands of a backward pass."""

    grad_out: NDArray[Any]
    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]


def operands(shape: Shape, dtype: torch.dtype) -> tuple[Operands, list[torch.Tensor]]:
    """Return grad_out, q, k and v as arrays, and the same memory as tensors."""
    generator = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.heads, shape.kv_heads, shape.kv_heads)
    tensors = [torch.randn(shape.batch, h, shape.length, shape.dim, generator=generator).to(dtype) for h in heads]
    return Operands(*(as_numpy(x) for x in tensors)), tensors


def as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """Return an array that shares the tensor's memory."""
    if tensor.dtype != torch.bfloat16:
        return np.asarray(tensor.numpy())
    import ml_dtypes

    return np.asarray(tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))


def runs_of(shape: Shape, dtype: torch.dtype) -> Runs:
    """Return calls that compute the same gradients from results at hand."""
    arrays, (tensor_grad, *inputs) = operands(shape, dtype)
    leaves = [x.requires_grad_() for x in inputs]
    tensor_out = torch.nn.functional.scaled_dot_product_attention(
        *leaves, is_causal=shape.causal, enable_gqa=shape.heads != shape.kv_heads
    )
    runs: Runs = {
        "selfattn": own_run(shape, arrays),
        "PyTorch": lambda: torch.autograd.grad(tensor_out, leaves, tensor_grad, retain_graph=True),
    }
    for found, other in zip(runs["selfattn"]()[:3], runs["PyTorch"](), strict=True):
        compare(found, as_numpy(other), TOLERANCE[str(dtype).removeprefix("torch.")])
    return runs


def own_run(shape: Shape, arrays: Operands, num_threads: int | None = None) -> Callable[[], Any]:
    """Return a call that computes gradients from results at hand."""
    grad_out, q, k, v = arrays
    out, lse = sa.attention(q, k, v, causal=shape.causal, return_lse=True)
    options: Any = {"causal": shape.causal, "num_threads": num_threads}
    return lambda: sa.attention_backward(grad_out, q, k, v, out, lse, **options)


def option_runs() -> Runs:
    """Return calls with one option each, after the call without any."""
    shape = OPTIONS
    (grad_out, q, k, v), _ = operands(shape, torch.float32)
    rng = np.random.default_rng(0)
    pairs = (shape.heads, shape.length, shape.length)

    def call(names: tuple[str, ...] = (), values: NDArray[Any] = v, **options: Any) -> Callable[[], Any]:
        return alone(("q", "k", "v", *names), values, **options)

    def alone(wrt: tuple[str, ...], values: NDArray[Any] = v, **options: Any) -> Callable[[], Any]:
        out, lse = sa.attention(q, k, values, return_lse=True, **options)
        grad = np.resize(grad_out, out.shape)
        return lambda: sa.attention_backward(grad, q, k, values, out, lse, wrt=wrt, **options)

    return {
        "selfattn": call(),
        "bias (1, Sq, Sk)": call(("bias",), bias=rng.standard_normal((1, *pairs[1:]), dtype=np.float32)),
        "bias (H, Sq, Sk)": call(("bias",), bias=rng.standard_normal(pairs, dtype=np.float32)),
        "bias (H, 1, Sk)": call(("bias",), bias=rng.standard_normal((shape.heads, 1, shape.length), dtype=np.float32)),
        "sinks": call(("sinks",), sinks=rng.standard_normal(shape.heads)),
        "ALiBi slopes": call(("alibi_slopes",), alibi_slopes=sa.alibi_slopes(shape.heads)),
        "T5's table": call(("t5",), t5=sa.T5Bias(rng.standard_normal((32, shape.heads)))),
        "softcap": call(softcap=30.0),
        "dropout": call(dropout=0.1, seed=1),
        "gradient of q alone": alone(("q",)),
        "gradient of v alone": alone(("v",)),
        "half of the value width": call(values=np.ascontiguousarray(v[..., : shape.dim // 2])),
    }


def compare(found: Any, other: Any, tolerance: float) -> None:
    """Exit the program if two results differ."""
    a, b = np.asarray(found, dtype=np.float64), np.asarray(other, dtype=np.float64)
    difference = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    if difference > tolerance:
        sys.exit(f"results differ by {difference:.1e}")


def print_shapes(dtype: str, threads: int, seconds: float) -> None:
    """Print one row for each shape."""
    in_pairs = dtype == "bfloat16" and sa.active_isa() == "avx512_bf16"  # all other backward passes multiply by FMA
    print(f"\n{dtype}, {threads} thread{'s' * (threads > 1)}\n")
    print(f"| {COLUMNS} | selfattn | times PyTorch | of the peak of {'bfloat16 pairs' if in_pairs else 'FMA'} |")
    print("|---|---|---|---|")
    speedups = []
    for shape in SHAPES:
        times = interleave(runs_of(shape, getattr(torch, dtype)), seconds)
        own = Quartiles.of(times["selfattn"]).median
        ratio = ratios(times, "selfattn")["PyTorch"].median
        share = shape.flops / own / Peaks(threads, 0.2).flops("bfloat16" if in_pairs else "float32")
        speedups.append(ratio)
        print(f"| {tuple(shape)} | {own * 1e3:.2f} ms | {ratio:.2f} | {share:.0%} |", flush=True)
    print(f"\ngeometric mean {np.exp(np.mean(np.log(speedups))):.2f}, lowest {min(speedups):.2f}")


def print_scaling(dtype: str, threads: list[int], seconds: float) -> None:
    """Print how many times faster each shape is with more threads than with the first number of threads."""
    first, *others = threads
    print(f"\n{dtype}, time with {first} thread{'s' * (first > 1)} / time with others\n")
    print(f"| {COLUMNS} | {' | '.join(f'{n} threads' for n in others)} |")
    print("|---" * (1 + len(others)) + "|")
    for shape in SHAPES:
        arrays, _ = operands(shape, getattr(torch, dtype))
        times = interleave({str(n): own_run(shape, arrays, n) for n in threads}, seconds)
        found = [ratios(times, str(n))[str(first)].median for n in others]
        print(f"| {tuple(shape)} | {' | '.join(f'{ratio:.2f}' for ratio in found)} |", flush=True)


def forward_runs() -> Runs:
    """Return the forward pass without and with dropout."""
    (_, q, k, v), _ = operands(OPTIONS, torch.float32)
    return {
        "selfattn": lambda: sa.attention(q, k, v),
        "forward pass with dropout": lambda: sa.attention(q, k, v, dropout=0.1, seed=1),
    }


def print_options(threads: int, seconds: float) -> None:
    """Print the time of each option relative to the call without."""
    print(f"\noptions with gradient, {tuple(OPTIONS)}, {threads} thread{'s' * (threads > 1)}\n")
    print("| option | time / time without |")
    print("|---|---|")
    for runs in (option_runs(), forward_runs()):
        print_relative(runs, seconds)


def print_relative(runs: Runs, seconds: float) -> None:
    """Print the time of each call relative to that of the call without options."""
    plain = runs.pop("selfattn")
    for name, run in runs.items():
        times = interleave({"without": plain, "with": run}, seconds)
        print(f"| {name} | {ratios(times, 'without')['with'].median:.2f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", default=list(TOLERANCE), choices=list(TOLERANCE))
    parser.add_argument("--seconds", type=float, default=2.0, help="per row (default: %(default)s)")
    args = parser.parse_args()
    for threads in args.threads:
        sa.set_num_threads(threads)
        torch.set_num_threads(threads)
        for dtype in args.dtype:
            print_shapes(dtype, threads, args.seconds)
        print_options(threads, args.seconds)
    if len(args.threads) > 1:
        for dtype in args.dtype:
            print_scaling(dtype, args.threads, args.seconds)


if __name__ == "__main__":
    main()
