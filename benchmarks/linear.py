"""Time one linear layer with selfattn, PyTorch's `nn.Linear` and NumPy's `matmul`, over rows and sizes.

Run `python benchmarks/linear.py --help` for the options. PyTorch is left out where it is not installed. The types
"int8-highest", "int8-high" and "int8-medium" are float32 rows of x with 8-bit weights at a precision of `Linear`; they
are compared with PyTorch's layer in float32 and with its dynamically quantized layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any

from workbench.lines import compare_times, parse

ROWS = (1, 8, 64, 302, 512, 2048)
SIZES = ("384x384", "384x1536", "1536x384", "768x3072", "1024x1024", "4096x4096")


def calls(dtype: str, rows: int, depth: int, columns: int, threads: int) -> dict[str, Callable[[], Any]]:
    """Return one call per library, on equal operands."""
    import ml_dtypes
    import numpy as np

    import selfattn as sa

    rng = np.random.default_rng(0)
    precision: Any
    stored, _, precision = dtype.partition("-")
    kind = {"bfloat16": ml_dtypes.bfloat16, "int8": np.float32}.get(stored, stored)
    x, w = rng.standard_normal((rows, depth)).astype(kind), rng.standard_normal((depth, columns)).astype(kind)
    b = rng.standard_normal(columns).astype(kind)
    layer = sa.Linear(sa.quantize(w), b, precision=precision) if precision else sa.Linear(w, b)
    out = np.empty((rows, columns), kind)
    runs: dict[str, Callable[[], Any]] = {"selfattn": lambda: layer(x, out=out, num_threads=threads)}
    if dtype in ("float32", "float64"):
        product = np.empty((rows, columns), kind)
        runs["numpy"] = lambda: np.add(np.matmul(x, w, out=product), b, out=product)
    if importlib.util.find_spec("torch"):
        runs["pytorch"] = torch_call(x, w, b, threads)
        if precision:
            runs["pytorch int8"] = torch_call(x, w, b, threads, quantized=True)
    return runs


def torch_call(x: Any, w: Any, b: Any, threads: int, quantized: bool = False) -> Callable[[], Any]:
    """Return PyTorch's call. A quantized layer has one scale for all weights, and one for all numbers of x."""
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, x.dtype.name)

    def tensor(array: Any) -> Any:
        return torch.from_numpy(array.astype("float64")).to(dtype)

    layer = torch.nn.Linear(*w.shape, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(tensor(w.T))
    layer.bias.copy_(tensor(b))
    if quantized:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch moves quantization to another package
            kinds = {torch.nn.Linear}
            layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), kinds, dtype=torch.qint8)
    rows = tensor(x)
    torch.inference_mode().__enter__()
    return lambda: layer(rows)


def measure(args: argparse.Namespace) -> None:
    """Print one line per size, with the median rate and the ratios of the others' times."""
    print(f"{args.threads} thread(s): GFLOP/s of selfattn, and the times of others relative to it")
    for dtype in args.dtype:
        for size in args.sizes:
            depth, columns = map(int, size.split("x"))
            for rows in args.rows:
                seconds, ratios = compare_times(calls(dtype, rows, depth, columns, args.threads), args.seconds)
                rate = 2e-9 * rows * depth * columns / seconds
                print(f"{dtype:9} {size:>10} {rows:5} rows {rate:7.1f}  {ratios}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="DEPTHxCOLUMNS")
    measure(parse(parser, seconds=0.3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
