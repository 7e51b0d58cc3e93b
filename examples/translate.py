"""Translates between English and Portuguese with a trained model, and shows which source word each word comes from.

    python examples/translate.py "He went to Norway last month."
    python examples/translate.py --from pt "Ele foi para a Noruega no mês passado." --show
    python examples/translate.py < letter.txt > carta.txt

A sentence is an argument, or a line of the standard input; each is translated by itself.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

LANGUAGES = {"en": "English", "pt": "Portuguese"}
LINES = 1024  # lines of standard input to read, sort by length and translate at a time
MARK = "▁"  # in a token, marks the beginning of a word


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    try:
        from marian import Marian

        model = Marian(f"{args.source}-{args.target}")
        translate(model, args)
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, ValueError) as error:
        status("")
        print(f"translate.py: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="default: the lines of the standard input")
    parser.add_argument("--from", dest="source", choices=LANGUAGES, help="default: the other one than --to, or en")
    parser.add_argument("--to", dest="target", choices=LANGUAGES)
    parser.add_argument("--batch", type=int, default=32, help="sentences translated together (default: 32)")
    parser.add_argument("--show", action="store_true", help="print where each word of a translation looks")
    parser.add_argument("--picture", metavar="FILE", help="save that of the first sentence as a picture (.png, .svg)")
    parser.add_argument(
        "--head", default="1", choices=[*map(str, range(1, 9)), "mean"],
        help="of the last layer's eight; the first was trained to find the word that is being translated (default: 1)",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    other = {"en": "pt", "pt": "en", None: None}
    args.source = args.source or other[args.target] or "en"
    args.target = args.target or other[args.source]
    if args.source == args.target:
        parser.error(f"--from and --to are both {LANGUAGES[args.source]}")
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    return args


def translate(model: Any, args: argparse.Namespace) -> None:
    """Print the translation of each sentence, in order."""
    done, drawn = 0, False
    for sentences in groups(args.sentences):

        def progress(count: int, before: int = done, total: int = len(sentences)) -> None:
            status(f"{before + count} sentences" if count < total else "")

        for translation in model.translate(sentences, args.batch, args.show, progress):
            print(translation.text)
            if translation.text and args.show:
                show(translation, args.head)
        sys.stdout.flush()
        for sentence in filter(str.strip, sentences if args.picture and not drawn else ()):
            picture(model.translate([sentence], look=True)[0], args)
            drawn = True
            break
        done += len(sentences)
    if args.picture and not drawn:
        raise ValueError("there is no sentence to draw a picture of")


def groups(sentences: list[str]) -> Iterator[list[str]]:
    """Yield the sentences to translate; sentences from standard input come one by one."""
    if sentences:
        yield sentences
        return
    typed = sys.stdin.isatty()
    if typed:
        print("One sentence per line; Ctrl-D ends.", file=sys.stderr)
    lines = decoded(sys.stdin.buffer)
    while some := list(itertools.islice(lines, 1 if typed else LINES)):
        yield some


def decoded(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield lines of UTF-8 without their ends."""
    for line in lines:
        try:
            yield line.decode("utf8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the standard input is not UTF-8: {error.reason}") from error


def attention(translation: Any, head: str) -> tuple[Any, list[str], list[str]]:
    """Return the last layer's cross-attention (T, S), and the tokens of both sides without marks."""
    weights = translation.weights[-1]
    source, target = (
        [token.replace(MARK, "") or MARK for token in tokens] for tokens in (translation.source, translation.target)
    )
    return weights.mean(axis=0) if head == "mean" else weights[int(head) - 1], source, target


def show(translation: Any, head: str) -> None:
    """Print what each word of the translation attends to: its weights, and the word with the largest."""
    from selfattn import viz

    weights, source, target = attention(translation, head)
    headline, *lines = viz.text(weights, target, key_tokens=source).splitlines()
    print(headline)
    for line, row in zip(lines, weights, strict=True):
        print(f"{line}  {100 * row.max():3.0f} % {source[np.argmax(row)]}")
    print()


def picture(translation: Any, args: argparse.Namespace) -> None:
    """Save the cross-attention as a heatmap."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--picture needs matplotlib: pip install "selfattn[examples]"') from error
    from selfattn import viz

    weights, source, target = attention(translation, args.head)
    figure = Figure(figsize=(2.5 + 0.35 * len(source), 2 + 0.3 * len(target)), layout="constrained")
    head = "mean of heads" if args.head == "mean" else f"head {args.head}"
    title = f"Where each {LANGUAGES[args.target]} word looks (last layer, {head})"
    ax = viz.heatmap(weights, target, key_tokens=source, ax=figure.add_subplot(), title=title)
    ax.set(xlabel=LANGUAGES[args.source], ylabel=LANGUAGES[args.target])
    figure.savefig(args.picture, dpi=150)
    print(f"Saved the picture to {args.picture}", file=sys.stderr)


def status(text: str) -> None:
    """Show progress if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
