"""Train the Transformer of "Attention is all you need" (Vaswani et al., 2017), in NumPy and selfattn alone.

Its task: to translate numbers in words from English to Portuguese. In the end it translates numbers that it never saw.
As in the paper: encoder and decoder, norms after the sub-layers, sines and cosines for positions, one matrix for all
embeddings, Adam with a warm-up, an average of the last weights in the end, label smoothing (an option). There is no
dropout: examples are made as they are needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import numpy as np
from number_words import english, portuguese, vocabulary, words
from training import AdamW, Weights, inverse_root_rate
from training_options import add_checkpoint_options, add_options, check_checkpoint_options, check_options
from training_run import Step, save_curves, start, train
from transformer import END, PADDING, START, Transformer, generate
from transformer_layers import Config
from transformer_training import loss_and_gradients, random_weights

DIGITS = 9
SHORTEST = 3  # digits of a number that may be kept for the test: all shorter numbers are needed for training
AVERAGING = 0.01  # share of each step in the moving average of the weights, which translates
LONGEST = 24  # most tokens of a translation, including its end
# Options that a resumed run must share with its checkpoint. The last two choose the numbers that it must never see.
DEFINING = ("layers", "width", "heads", "seed", "test")
TOGETHER = 200  # numbers that are translated at a time

SPECIAL = {END: "</s>", PADDING: "<pad>", START: "<s>"}
WORDS = [*(SPECIAL[i] for i in range(len(SPECIAL))), *vocabulary()]
IDS = {word: i for i, word in enumerate(WORDS)}


def tokens(language: Callable[[int], str], number: int) -> list[int]:
    """Return the tokens of a number in words, and the end."""
    return [*(IDS[word] for word in words(language, number)), END]


def numbers(rng: np.random.Generator, count: int, shortest: int = 1) -> list[int]:
    """Return random numbers; every number of digits, from 1 to 9, is equally frequent."""
    digits = rng.integers(shortest, DIGITS + 1, count)
    lowest = np.where(digits == 1, 0, 10 ** (digits - 1))
    return rng.integers(lowest, 10**digits).tolist()


def held_out(seed: int, count: int) -> list[int]:
    """Return the numbers of the test, which the training leaves out."""
    rng, found = np.random.default_rng(seed), dict[int, None]()
    while len(found) < count:
        found |= dict.fromkeys(numbers(rng, count - len(found), SHORTEST))
    return list(found)


def step_on(config: Config, kept: Sequence[int], args: argparse.Namespace) -> Step:
    """Return the training's step. Its random numbers, never those of the test, depend only on the seed and the step."""
    left_out = set(kept)

    def step(weights: Weights, number: int) -> tuple[float, Weights, int]:
        drawn = numbers(np.random.default_rng([args.seed, number]), 2 * args.batch)
        batch = [n for n in drawn if n not in left_out][: args.batch]
        sources, targets = ([tokens(language, n) for n in batch] for language in (english, portuguese))
        count = sum(map(len, [*sources, *targets]))
        return *loss_and_gradients(config, weights, sources, targets, args.smoothing), count

    return step


def translate(config: Config, weights: Weights, asked: Sequence[int]) -> list[str]:
    """Translate numbers from English, always with the likeliest word; keys and values stay in caches."""
    model = Transformer(config, {**weights, "final_logits_bias": np.zeros(len(WORDS), np.float32)})
    found: list[str] = []
    for first in range(0, len(asked), TOGETHER):
        sources = [tokens(english, n) for n in asked[first : first + TOGETHER]]
        rows = generate(model, sources, LONGEST, repeats=True)
        found += (" ".join(WORDS[i] for i in row if i != END) for row in rows)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    config = Config("marian", args.layers, args.width, args.heads)
    kept = held_out(args.seed, args.test)
    optimiser = AdamW(beta2=0.98, epsilon=1e-9, decay=0.0, averaging=AVERAGING)
    run = start(random_weights(config, len(WORDS), args.seed), optimiser, args, DEFINING)
    count = sum(x.size for x in run.weights.values())
    print(f"{len(WORDS)} tokens, {count:,} weights, {args.batch} numbers a step; {len(kept):,} others for the test")
    train(run, step_on(config, kept, args), lambda n: args.rate * inverse_root_rate(n, args.width, args.warm_up), args)
    save_curves({"loss": run.losses}, "nats per token", args.picture)
    translated = translate(config, run.optimiser.mean, kept)
    right = [text == portuguese(n) for n, text in zip(kept, translated, strict=True)]
    for n, text, good in sorted(zip(kept, translated, right, strict=True), key=lambda row: row[2])[: args.show]:
        print(f"{n:,}: {english(n)} -> {text}" + ("" if good else f" (wrong: {portuguese(n)})"))
    print(f"{sum(right):,} of {len(kept):,} numbers that it never saw translated exactly: {np.mean(right):.2%}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"steps": 1500, "batch": 64, "layers": 2, "width": 128, "heads": 4, "warm-up": 250, "test": 2000, "show": 8}
    add_options(parser, sizes)
    add_checkpoint_options(parser)
    parser.add_argument("--rate", type=float, default=0.25, help="times the paper's learning rate (default: 0.25)")
    parser.add_argument("--smoothing", type=float, default=0.0, help="of labels; the paper's is 0.1 (default: 0)")
    args = parser.parse_args(arguments)
    check_options(parser, args, dict.fromkeys(sizes, 1) | {"show": 0})
    check_checkpoint_options(parser, args)
    if args.width % 2:
        parser.error("the width must be even: its halves are sines and cosines")
    if not 0 <= args.smoothing < 1:
        parser.error("the smoothing must be in [0, 1)")
    return args


if __name__ == "__main__":
    sys.exit(main())
