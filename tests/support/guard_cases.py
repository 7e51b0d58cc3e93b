"""Random calls of odd sizes, which `test_guard_pages` places next to inaccessible memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import selfattn as sa

NARROW = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
TYPES = np.dtype(np.float32), np.dtype(np.float64), *NARROW
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 97, 127, 128, 129)
HEAD_DIMS = (1, 3, 7, 15, 17, 31, 33, 40, 64, 65, 72, 129)
LONG = (1025, 2049, 2175)  # few rows: the keys are split into ranges


class Case(NamedTuple):
    """A call: arrays that may be placed anywhere, and everything else."""

    kind: str  # attention, chosen, piece, gradients, layer, relative, relative_gradients, rope
    arrays: dict[str, Any]
    settings: dict[str, Any]

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in self.arrays.items())
        return f"{self.kind}: {shapes}; {self.settings}"


def cases(seed: int) -> Any:
    """Every head_dim with every number of queries in every dtype, layers, relative terms and rope."""
    rng = np.random.default_rng(seed)
    for dtype in TYPES:
        for head_dim in HEAD_DIMS:
            for q_len in LENGTHS:
                yield attention_case(rng, dtype, head_dim, q_len, int(rng.choice(LENGTHS)))
            yield attention_case(rng, dtype, head_dim, int(rng.choice(LENGTHS[:3])), int(rng.choice(LONG)))
            yield attention_case(rng, dtype, head_dim, int(rng.choice(LENGTHS[3:])), int(rng.choice(LONG)))
            yield gradient_case(rng, dtype, head_dim, int(rng.choice(LENGTHS)), int(rng.choice(LENGTHS)))
            yield chosen_case(rng, dtype, head_dim, int(rng.choice(LENGTHS)), int(rng.choice(LENGTHS)))
            yield piece_case(rng, dtype, head_dim, int(rng.choice(LENGTHS)), int(rng.choice(LENGTHS)))
            for _ in range(4):
                yield layer_case(rng, dtype, head_dim)
            for _ in range(2):
                yield relative_case(rng, dtype, head_dim)
            yield relative_gradient_case(rng, dtype, head_dim)
            if head_dim > 1:
                yield rope_case(rng, dtype, head_dim)


def term_cases(seed: int) -> Any:
    """Masks and biases of every short length, whose whole rows are read before use."""
    rng = np.random.default_rng(seed)
    for kv_len in range(1, 34):
        shape = (1, 2, 49, kv_len)
        q, k = (rng.standard_normal((1, 2, length, 8)).astype(np.float32) for length in shape[2:])
        bias = rng.standard_normal(shape).astype(drawn_type(rng))
        yield Case("attention", {"q": q, "k": k, "v": k, "mask": rng.random(shape) < 0.7, "bias": bias}, {})


def drawn_type(rng: Any) -> Any:
    return TYPES[int(rng.integers(len(TYPES)))]


def narrower(rng: Any, dtype: Any) -> Any:
    """Draw the type of keys and values for queries of this type."""
    fitting = [other for other in TYPES if other.itemsize < np.dtype(dtype).itemsize]
    return fitting[int(rng.integers(len(fitting)))] if fitting and rng.random() < 0.4 else dtype


def attention_case(rng: Any, dtype: Any, head_dim: int, q_len: int, kv_len: int) -> Case:
    small = q_len * kv_len < 5000 and kv_len < LONG[0]
    batch = int(rng.integers(1, 3)) if small else 1
    kv_heads = int(rng.integers(1, 3)) if small else 1
    heads = kv_heads * int(rng.integers(1, 4))
    value_dim = int(rng.choice(HEAD_DIMS))
    bshd = rng.random() < 0.4
    kv_dtype = narrower(rng, dtype)

    def tokens(heads: int, length: int, dim: int, dtype: Any = dtype) -> Any:
        x = rng.standard_normal((batch, length, heads, dim) if bshd else (batch, heads, length, dim))
        return x.astype(dtype)

    arrays = {
        "q": tokens(heads, q_len, head_dim),
        "k": tokens(kv_heads, kv_len, head_dim, kv_dtype),
        "v": tokens(kv_heads, kv_len, value_dim, kv_dtype),
        **score_arrays(rng, (batch, heads, q_len, kv_len)),
    }
    if rng.random() < 0.7:
        arrays["out"] = tokens(heads, q_len, value_dim)
    return Case("attention", arrays, {**score_settings(rng), "layout": "bshd" if bshd else "bhsd"})


def chosen_case(rng: Any, dtype: Any, head_dim: int, q_len: int, kv_len: int) -> Case:
    """Draw a call whose queries choose blocks of keys; the last block may reach beyond the keys."""
    case = attention_case(rng, dtype, head_dim, q_len, kv_len)
    settings = {name: x for name, x in case.settings.items() if name not in ("return_weights", "dropout", "seed")}
    block = int(rng.integers(1, 9)), int(rng.integers(1, 40))
    rows, count = -(-q_len // block[0]), -(-kv_len // block[1])
    indices = rng.integers(-1, count, (1, 1, rows, 3))
    indices[..., 0] = count - 1
    return Case("chosen", {**case.arrays, "block_indices": indices}, {**settings, "block_size": block})


def gradient_case(rng: Any, dtype: Any, head_dim: int, q_len: int, kv_len: int) -> Case:
    case = attention_case(rng, dtype, head_dim, q_len, kv_len)
    if rng.random() < 0.3:
        heads = case.arrays["q"].shape[-2 if case.settings["layout"] == "bshd" else -3]
        case.settings["t5"] = sa.T5Bias(rng.standard_normal((8, heads)), max_distance=30)
    return with_gradients(rng, case, "gradients", ("q", "k", "v", "scale"))


def relative_gradient_case(rng: Any, dtype: Any, head_dim: int) -> Case:
    case = relative_case(rng, dtype, head_dim)
    return with_gradients(rng, case, "relative_gradients", ("q", "k", "v", "r", "u", "w", "scale"))


def with_gradients(rng: Any, case: Case, kind: str, names: tuple[str, ...]) -> Case:
    """Return the call that computes some gradients of a call."""
    arrays = {name: x for name, x in case.arrays.items() if name != "out"}
    settings = {name: x for name, x in case.settings.items() if name not in ("return_lse", "return_weights")}
    forward = call(Case(case.kind, arrays, {**settings, "return_lse": True, "return_weights": True}), arrays)
    arrays["result"], arrays["lse"] = forward[:2]
    for name, like in {"grad_out": forward[0], "grad_lse": forward[1], "grad_weights": forward[2]}.items():
        if name == "grad_out" or rng.random() < 0.4:
            arrays[name] = rng.standard_normal(like.shape).astype(like.dtype)
    terms = [name for name in ("bias", "alibi_slopes", "sinks", "t5") if name in {**arrays, **settings}]
    wanted = [name for name in (*names, *terms) if rng.random() < 0.7]
    return Case(kind, arrays, {**settings, "wrt": wanted or names})


def piece_case(rng: Any, dtype: Any, head_dim: int, q_len: int, kv_len: int) -> Case:
    """Draw a call in which an AttentionState absorbs one piece, from the middle of all keys."""
    case = attention_case(rng, dtype, head_dim, q_len, kv_len)
    settings = {name: x for name, x in case.settings.items() if name not in ("return_lse", "return_weights")}
    first = int(rng.integers(200))
    return Case("piece", case.arrays, {**settings, "first": first, "kv_len": first + kv_len + int(rng.integers(200))})


def score_arrays(rng: Any, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Draw optional operands for scores of this shape."""
    batch, heads, q_len, kv_len = shape

    def broadcastable() -> tuple[int, ...]:
        full = tuple(1 if rng.random() < 0.3 else n for n in shape)
        return full[int(rng.integers(4)) :]

    makers = {
        "mask": lambda: rng.random(broadcastable()) < 0.7,
        "bias": lambda: rng.standard_normal(broadcastable()).astype(drawn_type(rng)),
        "kv_lens": lambda: rng.integers(0, kv_len + 1, batch),
        "kv_starts": lambda: rng.integers(0, kv_len + 1, batch),
        "q_lens": lambda: rng.integers(0, q_len + 1, batch),
        "q_offset": lambda: rng.integers(-q_len, kv_len + 1, batch),
        "alibi_slopes": lambda: rng.random((batch, heads)[int(rng.integers(2)) :]).astype(drawn_type(rng)),
        "sinks": lambda: rng.standard_normal(heads).astype(drawn_type(rng)),
    }
    chosen = {name: make() for name, make in makers.items() if rng.random() < 0.35}
    if "kv_lens" in chosen and "q_offset" not in chosen:  # lengths of keys alone may be ambiguous
        chosen.setdefault("q_lens", np.full(batch, q_len))
    return chosen


def score_settings(rng: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "causal": bool(rng.random() < 0.4),
        "return_lse": bool(rng.random() < 0.4),
        "return_weights": bool(rng.random() < 0.4),
        "num_threads": int(rng.integers(1, 3)),
    }
    if rng.random() < 0.3:
        settings["window"] = tuple(None if rng.random() < 0.2 else int(n) for n in rng.integers(0, 70, 2))
    if rng.random() < 0.2:
        settings["chunk"] = int(rng.integers(1, 70))
    if rng.random() < 0.3:
        settings["softcap"] = 5.0
    if rng.random() < 0.3:
        settings["precision"] = str(rng.choice(["high", "medium"]))
    if rng.random() < 0.2:
        settings.update(dropout=0.3, seed=1)
    return settings


def layer_case(rng: Any, dtype: Any, head_dim: int) -> Case:
    batch, length, context_len = (int(rng.choice(LENGTHS[:n])) for n in (3, 13, 13))
    depth, other_depth, value_dim, d_out = (int(n) for n in rng.choice(HEAD_DIMS[:9], 4))
    kv_heads = int(rng.integers(1, 3))
    heads = kv_heads * int(rng.integers(1, 3))
    cross = rng.random() < 0.4
    other_depth, keys = (other_depth, context_len) if cross else (depth, length)
    rope = head_dim > 1 and rng.random() < 0.5

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    arrays = {
        "x": normal(batch, length, depth),
        "w_q": normal(depth, heads * head_dim),
        "w_k": normal(other_depth, kv_heads * head_dim),
        "w_v": normal(other_depth, kv_heads * value_dim),
        **score_arrays(rng, (batch, heads, length, keys)),
    }
    if cross:
        arrays["context"] = normal(batch, context_len, other_depth)
    if rng.random() < 0.7:
        arrays["w_o"] = normal(heads * value_dim, d_out)
    for letter in "qkvo":
        if f"w_{letter}" in arrays and rng.random() < 0.5:
            arrays[f"b_{letter}"] = normal(arrays[f"w_{letter}"].shape[1])
    if rope and rng.random() < 0.7:
        arrays["positions"] = rng.integers(0, 1000, (batch, length)[int(rng.integers(2)) :])
    if rng.random() < 0.5:
        arrays["out"] = normal(batch, length, arrays["w_o"].shape[1] if "w_o" in arrays else heads * value_dim)
    settings = {**score_settings(rng), "num_heads": heads, "num_kv_heads": kv_heads}
    if rope:
        settings["rope"] = sa.RoPE(rotary_dim=head_dim // 2 * 2, interleaved=bool(rng.random() < 0.5))
    return Case("layer", arrays, settings)


def relative_case(rng: Any, dtype: Any, head_dim: int) -> Case:
    batch, kv_heads, group = (int(n) for n in rng.integers(1, 3, 3))
    heads, segment, memory = kv_heads * group, int(rng.choice(LENGTHS)), int(rng.choice((0, *LENGTHS)))
    kv_dtype, rows, causal = narrower(rng, dtype), int(rng.choice(LENGTHS)), bool(rng.random() < 0.7)
    length, own = memory + segment, (heads,) if rng.random() < 0.7 else ()

    def normal(*shape: int, dtype: Any = dtype) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    arrays = {
        "q": normal(batch, heads, segment, head_dim),
        "k": normal(batch, kv_heads, length, head_dim, dtype=kv_dtype),
        "v": normal(batch, kv_heads, length, 9, dtype=kv_dtype),
        "r": normal(*own, rows + 1, head_dim, dtype=narrower(rng, dtype)),
        "u": normal(heads, head_dim, dtype=np.float64),
        "w": normal(heads, head_dim, dtype=np.float64),
        **score_arrays(rng, (batch, heads, segment, length)),
    }
    arrays.pop("q_offset", None)
    if rng.random() < 0.7:
        arrays["out"] = normal(batch, heads, segment, 9)
    origin = int(rng.integers(0 if causal else 1, rows + 1))
    return Case("relative", arrays, {**score_settings(rng), "mem_len": memory, "causal": causal, "r_origin": origin})


def rope_case(rng: Any, dtype: Any, head_dim: int) -> Case:
    length = int(rng.choice(LENGTHS))
    x = rng.standard_normal((2, 3, length, head_dim)).astype(dtype)
    arrays = {"x": x, "positions": rng.integers(0, 1 << 20, length)}
    if rng.random() < 0.7:
        arrays["out"] = np.empty_like(x)
    axes = None
    if rng.random() < 0.5:
        axes = np.arange(head_dim // 2) % 2
        arrays["positions"] = rng.integers(0, 1 << 20, (max(axes) + 1, length))
    rope = sa.RoPE(rotary_dim=head_dim // 2 * 2, interleaved=bool(rng.random() < 0.5), axes=axes)
    return Case("rope", arrays, {"rope": rope})


def call(case: Case, arrays: dict[str, Any]) -> tuple[Any, ...]:
    """Make the call with these arrays, which may be copies of the case's arrays; return all results."""
    given = {**arrays, **case.settings}
    if case.kind in ("attention", "chosen"):
        result = sa.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    elif case.kind == "gradients":
        operands = [given.pop(name) for name in ("grad_out", "q", "k", "v", "result", "lse")]
        result = tuple(x for x in sa.attention_backward(*operands, **given) if x is not None)
    elif case.kind == "relative_gradients":
        operands = [given.pop(name) for name in ("grad_out", "q", "k", "v", "r", "u", "w", "result", "lse")]
        result = tuple(x for x in sa.relative_attention_backward(*operands, **given) if x is not None)
    elif case.kind == "piece":
        piece = {name: given.pop(name) for name in ("k", "v", "mask", "bias") if name in given}
        out = given.pop("out", None)
        state = sa.AttentionState(**given)
        state.absorb(**piece)
        result = state.result(out)
    elif case.kind == "relative":
        result = sa.relative_attention(**given)
    elif case.kind == "rope":
        result = sa.apply_rope(given.pop("x"), given.pop("positions"), given.pop("rope"), **given)
    else:
        layer_names = {"w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o", "num_heads", "num_kv_heads", "rope"}
        layer = sa.SelfAttention(**{name: given.pop(name) for name in layer_names & given.keys()})
        result = layer(given.pop("x"), **given)
    return result if isinstance(result, tuple) else (result,)
