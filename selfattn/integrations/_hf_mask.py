"""Translates masks of transformers into intervals and lengths for selfattn; makes a dense mask only if it must."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_leaves, tree_map
from transformers import masking_utils

from .. import _core
from .._arguments import core_options
from ._deferred import Deferred

# Closures of transformers that compute which keys a query sees; they are recognized by their code objects.
_INTERSECTION = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_TWO_SIDED = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_CHUNKS = masking_utils.chunked_overlay(1, torch.zeros(1)).__code__
_ATEN = torch.ops.aten
_SUMS = {_ATEN.add, _ATEN.add_, _ATEN._foreach_add, _ATEN._foreach_add_}  # in all their overloads, such as `out=`


class Chunks(NamedTuple):
    """Queries see the keys of their own chunk of `size` tokens, counted from the end of the padding on the left."""

    size: int
    padding: NDArray[np.int64]  # (B,)

    def starts(self, position: int) -> NDArray[np.int64]:
        """Return where the chunk of a position starts in each batch entry."""
        return position - (position - self.padding) % self.size


class Pattern(NamedTuple):
    """A mask function that selfattn's options can express: is it causal, and how many tokens are seen per side?"""

    causal: bool
    left: int | None = None
    right: int | None = None
    chunks: Chunks | None = None


_CAUSAL, _EVERYTHING = Pattern(causal=True), Pattern(causal=False)


class VisibleKeys(Deferred):
    """A boolean mask (B, 1, Sq, Sk) that is described instead of computed.

    Code that adds a mask to its scores expects numbers; added booleans would do the opposite. So sums with a floating
    tensor (`add`, `add_` and `_foreach_add` in all their overloads) use 0 and the lowest number instead. Views of the
    mask (slices, `expand`, `None` as an index) and clones are also of this class. Results of other operations, such as
    advanced indexing, `repeat` and `&`, are ordinary boolean tensors.
    """

    options: dict[str, Any]  # options of selfattn.attention
    sizes: tuple[int, int, int]
    end: int  # no query sees keys from here on
    prepared: dict[Any, _core.Options]  # results of `prepare`, by its arguments

    @staticmethod
    def describe(
        sizes: tuple[int, int, int], end: int, options: dict[str, Any], make: Callable[[], Any]
    ) -> VisibleKeys:
        """Return a mask for `sizes` (batch, q_len, kv_len), equal to what `make` would compute."""
        batch, q_len, kv_len = sizes
        mask = VisibleKeys.without_memory((batch, 1, q_len, kv_len), torch.bool)
        mask.sizes, mask.end, mask.options, mask.make, mask.made, mask.prepared = sizes, end, options, make, None, {}
        return mask

    def prepare(self, scale: float | None, softcap: float | None, num_threads: int) -> _core.Options:
        """Return a call's options in the core's form, in layout "bshd"; they are made once for all layers."""
        key = (scale, softcap, num_threads)
        if key not in self.prepared:
            self.prepared[key] = core_options(
                "attention", layout="bshd", scale=scale, softcap=softcap, num_threads=num_threads, **self.options
            )
        return self.prepared[key]

    def to_add(self, dtype: torch.dtype) -> torch.Tensor:
        """Return 0 for visible keys and the lowest finite number for the others."""
        return torch.zeros((), dtype=dtype).where(self.dense(), torch.finfo(dtype).min)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scores = _scores(args) if getattr(func, "overloadpacket", None) in _SUMS else []
        masks: dict[int, VisibleKeys] = {}

        def read(x: Any) -> Any:
            if isinstance(x, VisibleKeys):
                masks[id(x.dense())] = x
                return x.to_add(scores[0].dtype) if scores else x.dense()
            return x.dense() if isinstance(x, Deferred) else x

        args, kwargs = tree_map(read, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if getattr(func, "is_view", False) or func is _ATEN.clone.default:
            return tree_map(_part, result)
        return masks.get(id(result), result)  # an in-place operation returns the mask itself


def _part(made: torch.Tensor) -> torch.Tensor:
    """Wrap a dense boolean mask in `VisibleKeys`, which can be added to scores; return other dtypes unchanged."""
    if made.dtype is not torch.bool:
        return made
    mask = VisibleKeys.without_memory(made.shape, torch.bool, made.stride())
    mask.made = made
    return mask


def _scores(args: Any) -> list[torch.Tensor]:
    """Return the floating tensors that a mask is added to."""
    return [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return the mask of one kind of layer, for `attention_forward`.

    Never None, because then a module's `is_causal` would decide, and some models set it wrongly. Query i is at position
    ``i + q_offset``, key j at ``j + kv_offset``. `attention_mask` (B, tokens) is True for real tokens.
    """
    tracing = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if not tracing and type(q_offset) is not int:
        q_offset = int(q_offset)  # may be a tensor that a static cache will change
    # Indexers add the mask to their scores, or append numbers to it; booleans would do the opposite.
    additive = config is not None and _has_indexer(config)
    kwargs["allow_is_causal_skip"] = kwargs["allow_is_bidirectional_skip"] = False
    make = partial(
        masking_utils.eager_mask if additive else masking_utils.sdpa_mask, batch_size=batch_size, q_length=q_length,
        kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
    pattern = None if tracing or additive else pattern_of(mask_function)
    if pattern is None or not _is_plain(attention_mask, batch_size):
        return make()  # type: ignore[no-any-return, unused-ignore]
    offset = q_offset - kv_offset
    end = min(kv_length, offset + q_length) if pattern.causal else kv_length
    if end <= 0:
        return make()  # type: ignore[no-any-return, unused-ignore]
    options = _options(pattern, q_length, offset, end)
    chunked = _chunked(pattern.chunks, q_length, q_offset, kv_offset)
    if chunked is None:
        return make()  # type: ignore[no-any-return, unused-ignore]
    options |= chunked
    if attention_mask is not None:
        keys = _real_keys(attention_mask, kv_offset, end)
        if np.count_nonzero(keys) < keys.size:
            padding = _padding(keys)
            if "kv_starts" in padding and "kv_starts" in options:
                padding["kv_starts"] = np.maximum(padding["kv_starts"], options["kv_starts"])
            options |= padding
    if options.keys() & {"causal", "window", "chunk"} and ("kv_lens" in options or end != offset + q_length):
        options["q_offset"] = np.array(offset)
    return VisibleKeys.describe((batch_size, q_length, kv_length), end, options, make)


def _has_indexer(config: Any) -> bool:
    """Return ``hasattr(config, "index_topk")``, without the slow lookup of configurations."""
    return hasattr(type(config), "index_topk") or "index_topk" in object.__getattribute__(config, "__dict__")


def pattern_of(mask_function: Callable[..., Any]) -> Pattern | None:
    """Return the rule that a mask function of transformers computes; None if our options cannot express it."""
    if mask_function is masking_utils.causal_mask_function:
        return _CAUSAL
    if mask_function is masking_utils.bidirectional_mask_function:
        return _EVERYTHING
    if getattr(mask_function, "__code__", None) is not _INTERSECTION:
        return None
    parts = _captured(mask_function)
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    overlay, base = parts
    code = getattr(overlay, "__code__", None)
    if code is _WINDOW and base is masking_utils.causal_mask_function:
        left = _captured(overlay) - 1
        return Pattern(causal=True, left=left) if left >= 0 else None
    if code is _CHUNKS and base is masking_utils.causal_mask_function:
        size, padding = (cell.cell_contents for cell in overlay.__closure__)  # in the order of their names
        if type(padding) is not torch.Tensor or not padding.is_cpu:
            return None
        return Pattern(causal=True, chunks=Chunks(int(size), padding.numpy().astype(np.int64)))
    if code is _TWO_SIDED and base is masking_utils.bidirectional_mask_function:
        reach = _captured(overlay)
        return Pattern(causal=False, left=reach, right=reach) if reach >= 0 else None
    return None


def _captured(function: Any) -> Any:
    """Return the first variable captured by a closure."""
    return function.__closure__[0].cell_contents


def _options(pattern: Pattern, q_length: int, offset: int, end: int) -> dict[str, Any]:
    """Return the options that hide keys; an option that would hide none is left out."""
    causal, left, right, _ = pattern
    # A single query sees all keys before `end`.
    options: dict[str, Any] = {"causal": True} if causal and q_length > 1 else {}
    far_left = left is not None and offset + q_length - 1 > left
    if far_left or (right is not None and end - 1 - offset > right):
        options["window"] = (left, right)
    return options


def _chunked(chunks: Chunks | None, q_length: int, q_offset: int, kv_offset: int) -> dict[str, Any] | None:
    """Return the options for chunks; None if queries are in several chunks that do not start at multiples of a size."""
    if chunks is None:
        return {}
    starts = np.maximum(chunks.starts(q_offset) - kv_offset, 0)
    if q_length == 1:
        return {"kv_starts": starts} if starts.any() else {}
    if (chunks.starts(q_offset + q_length - 1) == chunks.starts(q_offset)).all():  # all queries are in one chunk
        return {"kv_starts": starts} if starts.any() else {}
    if (chunks.padding % chunks.size).any() or kv_offset % chunks.size:
        return None
    return {"chunk": chunks.size}


def _is_plain(attention_mask: torch.Tensor | None, batch_size: int) -> bool:
    if attention_mask is None:
        return True
    if type(attention_mask) is not torch.Tensor or not attention_mask.is_cpu:  # for example, a tensor without numbers
        return False
    return bool(attention_mask.ndim == 2 and attention_mask.shape[0] == batch_size)


def _real_keys(attention_mask: torch.Tensor, start: int, end: int) -> NDArray[np.bool_]:
    """Return which keys of a slice are real tokens, (B, end)."""
    if attention_mask.dtype is not torch.bool:
        attention_mask = attention_mask.to(torch.bool)
    keys: NDArray[np.bool_] = attention_mask.numpy()[:, start : start + end]
    return keys if keys.shape[1] == end else np.pad(keys, ((0, 0), (0, end - keys.shape[1])))


def _padding(keys: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the options that hide padding: where real tokens start and end, or a mask of keys if they have gaps."""
    kv_len = keys.shape[1]
    counts = np.count_nonzero(keys, axis=1)
    starts = np.where(counts > 0, keys.argmax(axis=1), 0)
    ends = starts + counts
    places = np.arange(kv_len)
    if not np.array_equal(keys, (places >= starts[:, None]) & (places < ends[:, None])):
        return {"mask": keys[:, None, None, :]}
    options = {"kv_starts": starts} if starts.any() else {}
    return options if (ends == kv_len).all() else {**options, "kv_lens": ends}
