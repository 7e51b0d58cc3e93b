"""Time a new token of a batch in a transformers model, with each attention implementation and cache.

Run as a module, this is the process that measures with one number of threads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import selfattn
from selfattn._bench.report import format_seconds
from selfattn._bench.timing import Quartiles, interleave, ratios

from . import process
from .hf_models import LLAMA_1B, OWN, VOCABULARY, WORST, Mismatch, Shape, decoder

DTYPES = ("float32", "bfloat16")
SHAPE = replace(LLAMA_1B, layers=4)
PEER = "sdpa, static"  # what the others are compared with
RUNS = {
    "sdpa, dynamic": ("sdpa", "dynamic"), PEER: ("sdpa", "static"), "selfattn, dynamic": (OWN, "dynamic"),
    "selfattn, static": (OWN, "static"), "selfattn, Cache": (OWN, "Cache"), "selfattn, Cache in int8": (OWN, "int8"),
}  # fmt: skip
ROUNDED = {"int8"}  # caches whose numbers differ on purpose
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences (default 8)")
    parser.add_argument(
        "--length", type=int, default=4096, metavar="N", help="tokens before the new one (default 4096)"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="TYPE")
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1], metavar="N", help="numbers of threads (default 1)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="time per table (default 20)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few kilobytes, to try the command")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.answer:
        return measure(args)
    tables = []
    for threads in args.threads:
        for dtype in args.dtype:
            rows = _measure_in_process(args, threads, dtype)
            if rows is None:
                print(f"measuring {dtype} with {threads} threads failed", file=sys.stderr)
                return 1
            title = f"{args.batch} × {args.length} tokens, {dtype}, {threads} thread" + "s" * (threads > 1)
            tables.append(markdown(title, rows))
    print("\n\n".join(tables))
    return 0


def _measure_in_process(args: argparse.Namespace, threads: int, dtype: str) -> list[Row] | None:
    """Measure in a new process whose thread pools all have `threads` threads."""
    options = ["--dtype", dtype, "--batch", str(args.batch), "--length", str(args.length)]
    options += ["--seconds", str(args.seconds), *(["--tiny"] if args.tiny else [])]
    return process.answer_of("workbench.hf_caches", threads, *options)


def measure(args: argparse.Namespace) -> int:
    """Measure as the options say with one number of threads, and write the rows to the file `answer`."""
    (threads,), (dtype,) = args.threads, args.dtype
    import_module("torch").set_num_threads(threads)
    selfattn.set_num_threads(threads)
    steps = Steps(SHAPE.tiny() if args.tiny else SHAPE, dtype, args.batch, args.length)
    try:
        steps.check()
    except Mismatch as error:
        print(error, file=sys.stderr)
        return 1
    samples = interleave(steps.runs(), args.seconds)
    rows = [_row(name, samples) for name in samples]
    Path(args.answer).write_text(json.dumps(rows), encoding="utf-8")
    return 0


def _row(name: str, samples: dict[str, list[float]]) -> Row:
    against = ratios(samples, name).get(PEER)  # how many times as long the peer takes
    ratio = None if against is None else [1 / against.median, 1 / against.q3, 1 / against.q1]
    return {"name": name, "seconds": Quartiles.of(samples[name]).median, "ratio": ratio}


class Steps:
    """A model of random weights with filled caches, which all hold the same tokens."""

    def __init__(self, shape: Shape, dtype: str, batch: int, length: int) -> None:
        self.torch, self.hf = import_module("torch"), import_module("transformers")
        own = import_module("selfattn.integrations.transformers")
        own.register()
        self.torch.manual_seed(0)
        kind, config = decoder(self.hf, shape)
        self.dtype = dtype
        self.model = kind.from_config(config, attn_implementation=OWN, dtype=getattr(self.torch, dtype)).eval()
        self.caches = {
            "dynamic": self.hf.DynamicCache(config=config),
            "static": self.hf.StaticCache(config=config, max_cache_len=length + 64),
            "Cache": own.Cache(config),
            "int8": own.Cache(config, dtype="int8"),
        }
        with self.torch.inference_mode():
            for layer in range(shape.layers):
                # Attending to prompts of this length would take minutes, and is not what is measured.
                size = (batch, shape.kv_heads, length, shape.head_dim)
                k, v = (self.torch.randn(size, dtype=getattr(self.torch, dtype)) for _ in range(2))
                for cache in self.caches.values():
                    cache.update(k, v, layer)
        self.ids = self.torch.randint(3, VOCABULARY, (batch, 1))
        self.mask = self.torch.ones((batch, length + 1), dtype=self.torch.long)

    def runs(self) -> dict[str, Callable[[], Any]]:
        """Return the calls to time."""
        return {name: self._run(*run) for name, run in RUNS.items()}

    def check(self) -> None:
        """Raise unless all of them give the same logits."""
        wanted = self._run(*RUNS[PEER])().double()
        for name, run in RUNS.items():
            error = float((self._run(*run)().double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
            if not error <= (0.1 if run[1] in ROUNDED else WORST[self.dtype]):
                raise Mismatch(f"{name}, {self.dtype}: results differ by {error:.2g}")

    def _run(self, attention: str, kind: str) -> Callable[[], Any]:
        cache = self.caches[kind]

        def run() -> Any:
            self.model.config._attn_implementation = attention
            with self.torch.inference_mode():
                logits = self.model(self.ids, attention_mask=self.mask, past_key_values=cache, use_cache=True).logits
                if kind == "static":
                    for layer in cache.layers:
                        layer.cumulative_length.sub_(1)
                else:
                    cache.crop(-1)
            return logits

        return run


def markdown(title: str, rows: Sequence[Row]) -> str:
    """Return a table with a line per pair of attention and cache."""
    lines = [f"### {title}", "", f"| attention, cache | time of a step | of that of {PEER} |", "| --- | --: | --: |"]
    for row in rows:
        ratio = "1" if row["ratio"] is None else "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"])
        lines.append(f"| {row['name']} | {format_seconds(row['seconds'])} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
