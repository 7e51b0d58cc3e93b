"""The list of named workloads for benchmarks, documentation and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .options import Options
from .workload import Workload

PADDED_LENS = (128, 19, 64, 101, 33, 80, 117, 50)

# The workloads of `python -m selfattn bench` if none is named: one of each kind. They take half a minute in total.
QUICK = (
    "tiny-16",
    "embed-128",
    "bert-512",
    "vit-197",
    "prefill-1k-causal",
    "decode-4k-gqa",
    "projection-layer",
)


def attention_workload(
    name: str,
    why: str,
    heads: int | tuple[int, int],
    lens: int | tuple[int, int],
    dims: int | tuple[int, int],
    **more: Any,
) -> Workload:
    """Describe one call of `attention`.

    Parameters
    ----------
    heads : int or (num_heads, num_kv_heads)
    lens : int or (q_len, kv_len)
    dims : int or (head_dim, value_dim)
    **more
        `batch`, `dtype`, or any field of `Options`.
    """
    num_heads, num_kv_heads = (heads, heads) if isinstance(heads, int) else heads
    q_len, kv_len = (lens, lens) if isinstance(lens, int) else lens
    head_dim, value_dim = (dims, dims) if isinstance(dims, int) else dims
    batch, dtype = more.pop("batch", 1), more.pop("dtype", "float32")
    return Workload(
        name=name,
        why=why,
        kind="attention",
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        options=Options(**more),
    )


def layer_workload(name: str, why: str, batch: int, seq_len: int, d_model: int, num_heads: int) -> Workload:
    """Describe one call of a `SelfAttention` layer with d_model = num_heads * head_dim."""
    head_dim = d_model // num_heads
    return Workload(
        name=name,
        why=why,
        kind="layer",
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        q_len=seq_len,
        kv_len=seq_len,
        head_dim=head_dim,
        value_dim=head_dim,
        d_model=d_model,
    )


_SHORT = [
    attention_workload("tiny-64", "one head, call overhead counts", 1, 64, 64),
    attention_workload("tiny-16", "a short sentence, call overhead counts", 12, 16, 64),
    attention_workload("tiny-24", "a sentence whose length is no power of two", 12, 24, 64),
    attention_workload("embed-128", "MiniLM-like text embedding", 12, 128, 32, batch=8),
    attention_workload("bert-128", "BERT base, short text", 12, 128, 64),
    attention_workload("bert-512", "BERT base, full length", 12, 512, 64),
    attention_workload("vit-197", "ViT base: 14 x 14 patches and a class token", 12, 197, 64),
    attention_workload("whisper-1500", "Whisper tiny, 30 s of sound", 6, 1500, 64),
]

_PREFILL = [
    attention_workload(
        f"prefill-{label}{suffix}{causal_suffix}",
        f"prompt of {length} tokens, {kind}",
        heads,
        length,
        dim,
        causal=bool(causal_suffix),
    )
    for suffix, heads, dim, kind in (
        ("", (32, 8), 128, "GQA 32/8"),
        ("-d64", 12, 64, "12 heads of 64"),
    )
    for label, length in (("512", 512), ("1k", 1024), ("2k", 2048))
    for causal_suffix in ("", "-causal")
]

_LONG = [
    attention_workload("long-8k-causal", "a long document", 8, 8192, 128, causal=True),
    attention_workload(
        "window-256-8k",
        "local attention: 256 keys to the left",
        8,
        8192,
        64,
        causal=True,
        window=(255, 0),
    ),
]

_ODD = [
    attention_workload("odd-777-d80", "no length divides anything", 8, (777, 1001), 80),
    attention_workload("odd-d72", "head_dim 72, as in SigLIP", 16, 729, 72),
    attention_workload("d-256", "wide heads, as in Gemma", 8, 1024, 256, causal=True),
    attention_workload("f64-512", "double precision", 12, 512, 64, dtype="float64"),
]

_OPTIONS = [
    attention_workload("mask-bool-512", "a boolean mask per pair", 12, 512, 64, mask="pairs"),
    attention_workload("bias-512", "an additive bias per head and pair", 12, 512, 64, bias=True),
    attention_workload(
        "padded-lens-128",
        "a padded batch, its lengths as kv_lens",
        12,
        128,
        32,
        batch=len(PADDED_LENS),
        kv_lens=PADDED_LENS,
    ),
    attention_workload(
        "padded-mask-128",
        "a padded batch, its lengths as a boolean mask",
        12,
        128,
        32,
        batch=len(PADDED_LENS),
        kv_lens=PADDED_LENS,
        mask="keys",
    ),
    attention_workload("alibi-causal-1k", "ALiBi, as in MPT and BLOOM", 12, 1024, 64, causal=True, alibi=True),
    attention_workload("softcap-1k", "capped scores, as in Gemma 2", 8, 1024, 128, causal=True, softcap=50.0),
]

_DECODE = [
    attention_workload("decode-4k-gqa", "one new token, GQA 32/8, 4,096 keys", (32, 8), (1, 4096), 128, causal=True),
    attention_workload("decode-32k-gqa", "one new token, 32,768 keys", (32, 8), (1, 32768), 128, causal=True),
    attention_workload("decode-4k-mha", "one new token, a KV head per head", 32, (1, 4096), 128, causal=True),
    attention_workload("spec-8x3k", "8 drafted tokens on 3,000 keys", (32, 8), (8, 3000), 128, causal=True),
    attention_workload(
        "batch-decode-16x700",
        "one new token of each of 16 sequences",
        (32, 8),
        (1, 700),
        128,
        batch=16,
        causal=True,
    ),
]

_LAYERS = [
    layer_workload("projection-layer-384", "a MiniLM layer's attention", 8, 128, 384, 12),
    layer_workload("projection-layer", "a BERT base layer's attention", 1, 512, 768, 12),
]

ALL: tuple[Workload, ...] = (
    *_SHORT,
    *_PREFILL,
    *_LONG,
    *_ODD,
    *_OPTIONS,
    *_DECODE,
    *_LAYERS,
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in ALL}


def find(names: list[str], known: Mapping[str, Workload] = WORKLOADS) -> list[Workload]:
    """Workloads by name.

    Raises
    ------
    ValueError
        For an unknown name; the message lists the known ones.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"bench: no workload {name!r}; known are {', '.join(known)}")
    return [known[name] for name in names]


def from_shape(shape: str, dtype: str = "float32") -> Workload:
    """Return a workload from a shape in the form "batch,heads,length,head_dim".

    Raises
    ------
    ValueError
        If the text is not four positive integers.
    """
    parts = shape.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"bench: shape must be four positive integers B,H,S,D, got {shape!r}")
    batch, heads, length, dim = (int(part) for part in parts)
    return attention_workload(shape, "shape given", heads, length, dim, batch=batch, dtype=dtype)
