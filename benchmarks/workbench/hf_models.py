"""Transformers models with random weights, timed with selfattn and with the attention they use otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

OWN = "selfattn"
VOCABULARY = 4096  # small, since the embedding and the projection to the vocabulary are not compared
NEW_TOKENS = 16
RAGGED = 8  # sequences in a padded batch
WORST = {"float32": 1e-4, "bfloat16": 0.04}  # largest relative error: RMS of the difference over RMS of the result
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `tiny` is for tests."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0

    def tiny(self) -> Shape:
        """Return a small shape with the same ratio of heads."""
        group = self.heads // self.kv_heads
        return Shape(2, 16 * group, 48, 2 * group, 2, 8, window=min(self.window, 7))

    def config(self) -> dict[str, Any]:
        """Return the arguments that have the same names in all models' configurations."""
        return {
            **COMMON, "num_hidden_layers": self.layers, "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_attention_heads": self.heads, "max_position_embeddings": 8192,
            "initializer_range": 1.2 / self.hidden**0.5,  # wide enough that a wrong mask shows in the result
        }  # fmt: skip

    def grouped(self) -> dict[str, Any]:
        """Return the arguments of `config` with grouped heads."""
        return {**self.config(), "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim}


def _encoder(hf: Any, shape: Shape) -> Any:
    return hf.AutoModel, hf.BertConfig(**shape.config())


def decoder(hf: Any, shape: Shape) -> Any:
    """Return the class and the configuration of a Llama-shaped model."""
    return hf.AutoModelForCausalLM, hf.LlamaConfig(**shape.grouped())


def _gemma2(hf: Any, shape: Shape) -> Any:
    config = hf.Gemma2Config(**shape.grouped(), sliding_window=shape.window, query_pre_attn_scalar=shape.head_dim)
    return hf.AutoModelForCausalLM, config


def _gpt_oss(hf: Any, shape: Shape) -> Any:
    # Every token uses all 4 experts, as many as the real model chooses out of 32.
    rope = {"rope_type": "default", "rope_theta": 150000.0}
    config = hf.GptOssConfig(
        **shape.grouped(), sliding_window=shape.window, num_local_experts=4, num_experts_per_tok=4, rope_parameters=rope
    )
    return hf.AutoModelForCausalLM, config


@dataclass(frozen=True)
class Group:
    """The timings of one model.

    Attributes
    ----------
    title : str
    peer : str
        The attention implementation that transformers uses otherwise.
    shape : Shape
    make : callable
        Returns the model's class and configuration.
    kind : str
        forward, padded, decode, static or generate.
    lengths : tuple of int
        Lengths of sequences, caches or prompts.
    """

    title: str
    peer: str
    shape: Shape
    make: Callable[[Any, Shape], Any]
    kind: str
    lengths: tuple[int, ...]


BERT_BASE = Shape(12, 768, 3072, 12, 12, 64)
LLAMA_1B = Shape(6, 2048, 8192, 32, 8, 64)
GEMMA2_2B = Shape(4, 2304, 9216, 8, 4, 256, window=4096)
GPT_OSS_20B = Shape(4, 2880, 2880, 64, 8, 64, window=128)
PREFILL = (16, 64, 128, 256, 512, 1024)
CACHED = (128, 512, 1024, 4096)

GROUPS = {
    "encoder": Group("BERT base, one sequence", "sdpa", BERT_BASE, _encoder, "forward", PREFILL),
    "padded": Group(
        f"BERT base, {RAGGED} sequences of different lengths, padded", "sdpa", BERT_BASE, _encoder, "padded",
        (32, 128, 512),
    ),
    "prefill": Group("Llama 3.2 1B's shape, 6 of 16 layers: prompt", "sdpa", LLAMA_1B, decoder, "forward", PREFILL),
    "decode": Group(
        "Llama 3.2 1B's shape, 6 of 16 layers: a new token, DynamicCache", "sdpa", LLAMA_1B, decoder, "decode", CACHED
    ),
    "static": Group(
        "Llama 3.2 1B's shape, 6 of 16 layers: a new token, StaticCache", "sdpa", LLAMA_1B, decoder, "static", CACHED
    ),
    "gemma2": Group(
        f"Gemma 2 2B's shape, 4 of 26 layers: a prompt and {NEW_TOKENS} new tokens", "eager", GEMMA2_2B, _gemma2,
        "generate", (128, 1024),
    ),
    "gpt_oss": Group(
        f"gpt-oss 20B's shape, 4 of 24 layers, 4 experts: a prompt and {NEW_TOKENS} new tokens", "eager", GPT_OSS_20B,
        _gpt_oss, "generate", (128, 512, 1024),
    ),
}  # fmt: skip

Run = Callable[[], Any]


class Mismatch(Exception):
    """selfattn's result differs from the peer's."""


class Bench:
    """One model whose attention implementation can be switched.

    Parameters
    ----------
    group : Group
    dtype : str
        float32 or bfloat16.
    tiny : bool
        Whether to use the small sizes for tests.
    """

    def __init__(self, group: Group, dtype: str, *, tiny: bool = False) -> None:
        self.torch, self.hf = import_module("torch"), import_module("transformers")
        import_module("selfattn.integrations.transformers").register()
        self.group, self.dtype = group, dtype
        self.torch.manual_seed(0)
        kind, config = group.make(self.hf, group.shape.tiny() if tiny else group.shape)
        self.model = kind.from_config(config, attn_implementation=group.peer, dtype=getattr(self.torch, dtype)).eval()
        with self.torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name.endswith("sinks"):  # transformers leaves them uninitialized
                    parameter.normal_()

    def runs(self, length: int) -> dict[str, Run]:
        """Return the calls to time at a length, by attention implementation; their results have been checked."""
        make = {"forward": self._forward, "padded": self._padded, "generate": self._generate}.get(self.group.kind)
        run, compare = make(length) if make else self._step(length)
        self._check(length, compare)
        return {name: self._attending(name, run) for name in (OWN, self.group.peer)}

    def _attending(self, name: str, run: Run) -> Run:
        def attend() -> Any:
            self.model.config._attn_implementation = name
            with self.torch.inference_mode():
                return run()

        return attend

    def _check(self, length: int, compare: Run) -> None:
        own, peer = (self._attending(name, compare)().double() for name in (OWN, self.group.peer))
        error = float((own - peer).square().mean().sqrt() / peer.square().mean().sqrt())
        if not error <= WORST[self.dtype]:
            raise Mismatch(f"{self.group.title}, length {length}, {self.dtype}: results differ by {error:.2g}")

    def _ids(self, batch: int, length: int) -> Any:
        return self.torch.randint(3, VOCABULARY, (batch, length), generator=self.torch.Generator().manual_seed(1))

    def _forward(self, length: int) -> tuple[Run, Run]:
        ids = self._ids(1, length)
        last = {"logits_to_keep": 1} if self.group.make is decoder else {}

        def run() -> Any:
            return self.model(ids, **last)[0]

        return run, run

    def _padded(self, length: int) -> tuple[Run, Run]:
        ids = self._ids(RAGGED, length)
        lengths = self.torch.linspace(length // 4, length, RAGGED).long()
        mask = (self.torch.arange(length) < lengths[:, None]).long()

        def run() -> Any:
            return self.model(ids, attention_mask=mask)[0]

        return run, lambda: run()[mask.bool()]

    def _generate(self, length: int) -> tuple[Run, Run]:
        ids = self._ids(1, length)
        count = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        mask = self.torch.ones_like(ids)

        def run() -> Any:
            return self.model.generate(ids, attention_mask=mask, **count)

        return run, lambda: self.model(ids, logits_to_keep=1).logits

    def _step(self, length: int) -> tuple[Run, Run]:
        """Decode one token after `length` others, then remove it from the cache."""
        ids = self._ids(1, length + 1)
        static = self.group.kind == "static"
        if static:
            cache = self.hf.StaticCache(config=self.model.config, max_cache_len=length + 64)
        else:
            cache = self.hf.DynamicCache(config=self.model.config)
        with self.torch.inference_mode():
            self.model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)

        def run() -> Any:
            logits = self.model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
            if static:
                for layer in cache.layers:
                    layer.cumulative_length.sub_(1)
            else:
                cache.crop(-1)
            return logits

        return run, run
