"""Translates masks of transformers into intervals and lengths for selfattn; makes a dense mask only if it must."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

# Closures of transformers that compute what a query sees; they are recognized by their code objects.
_INTERSECTION = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_TWO_SIDED = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_ATEN = torch.ops.aten
_SUMS = {_ATEN.add, _ATEN.add_, _ATEN._foreach_add, _ATEN._foreach_add_}  # in all their overloads, such as `out=`


class Pattern(NamedTuple):
    """A mask function that selfattn's options can express: causal or not, and how many tokens are seen per side."""

    causal: bool
    left: int | None = None
    right: int | None = None


class VisibleKeys(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """A boolean mask (B, 1, Sq, Sk) that is described instead of computed.

    It has a shape but no memory. Every PyTorch operation, also in compiled and transformed code, gets the dense mask.
    The first operation creates it, and it is kept so that in-place changes take effect.

    Code that adds a mask to its scores expects numbers; added booleans would do the opposite. So sums with a floating
    tensor (`add`, `add_` and `_foreach_add` in all their overloads) use 0 and the lowest number instead. Views of the
    mask (slices, `expand`, `None` as an index) and clones are also of this class. Results of other operations, such as
    advanced indexing, `repeat` and `&`, are ordinary boolean tensors.
    """

    options: dict[str, Any]  # of selfattn.attention
    sizes: tuple[int, int, int]
    end: int  # no query sees keys from here on
    make: Callable[[], Any]
    made: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def describe(
        sizes: tuple[int, int, int], end: int, options: dict[str, Any], make: Callable[[], Any]
    ) -> VisibleKeys:
        """Return a mask for `sizes` (batch, q_len, kv_len), equal to what `make` would compute."""
        batch, q_len, kv_len = sizes
        mask = _without_memory((batch, 1, q_len, kv_len))
        mask.sizes, mask.end, mask.options, mask.make, mask.made = sizes, end, options, make, None
        return mask

    def dense(self) -> torch.Tensor:
        """Return the mask as an ordinary tensor, the same one each time."""
        if self.made is None:
            with _disable_current_modes():  # while code is compiled, tensors may have no values
                self.made = self.make()
        return self.made

    def to_add(self, dtype: torch.dtype) -> torch.Tensor:
        """Return 0 for visible keys and the lowest finite number for the others."""
        return torch.zeros((), dtype=dtype).where(self.dense(), torch.finfo(dtype).min)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scores = _scores(args) if getattr(func, "overloadpacket", None) in _SUMS else []
        masks: dict[int, VisibleKeys] = {}

        def read(x: Any) -> Any:
            if not isinstance(x, VisibleKeys):
                return x
            masks[id(x.dense())] = x
            return x.to_add(scores[0].dtype) if scores else x.dense()

        args, kwargs = tree_map(read, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if getattr(func, "is_view", False) or func is _ATEN.clone.default:
            return tree_map(_part, result)
        return masks.get(id(result), result)  # an in-place operation returns the mask itself

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Make torch.compile use the dense mask instead."""
        self.dense()
        return ["made"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> VisibleKeys:
        mask = _without_memory(size, stride)
        mask.made = parts["made"]
        return mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.dense())

    # Tensor methods that read memory without dispatching an operation.

    def numpy(self, **options: Any) -> NDArray[np.bool_]:
        array: NDArray[np.bool_] = self.dense().numpy(**options)
        return array

    def tolist(self) -> Any:
        return self.dense().tolist()

    def data_ptr(self) -> int:
        return int(self.dense().data_ptr())

    def share_memory_(self) -> VisibleKeys:
        self.dense().share_memory_()
        return self

    def __dlpack__(self, **options: Any) -> Any:
        return self.dense().__dlpack__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self.dense(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)


def _without_memory(shape: Any, strides: Any = None) -> VisibleKeys:
    mask: VisibleKeys = torch.Tensor._make_wrapper_subclass(
        VisibleKeys, shape, strides=strides, dtype=torch.bool, device="cpu"
    )
    torch._C._set_throw_on_mutable_data_ptr(mask)  # otherwise DLPack's C functions would read a null pointer
    return mask


def _part(made: torch.Tensor) -> torch.Tensor:
    """Wrap a dense boolean mask in the class that adds as numbers; return tensors of other dtypes unchanged."""
    if made.dtype is not torch.bool:
        return made
    mask = _without_memory(made.shape, made.stride())
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
    tracing = is_tracing(attention_mask) if attention_mask is not None else is_tracing()
    if not tracing:
        q_offset = int(q_offset)  # may be a tensor that a static cache will change
    # Indexers add the mask to their scores, or append numbers to it; booleans would do the opposite.
    additive = hasattr(config, "index_topk")
    make = partial(
        masking_utils.eager_mask if additive else masking_utils.sdpa_mask, batch_size=batch_size, q_length=q_length,
        kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )  # fmt: skip
    pattern = None if tracing or additive else pattern_of(mask_function)
    if pattern is None or not _is_plain(attention_mask, batch_size):
        return make()  # type: ignore[no-any-return, unused-ignore]
    offset = q_offset - kv_offset
    end = min(kv_length, offset + q_length) if pattern.causal else kv_length
    if end <= 0:
        return make()  # type: ignore[no-any-return, unused-ignore]
    options = _options(pattern, q_length, offset, end)
    keys = _real_keys(attention_mask, kv_offset, end)
    if keys is not None:
        options |= _padding(keys)
    if ("causal" in options or "window" in options) and ("kv_lens" in options or end != offset + q_length):
        options["q_offset"] = np.array(offset)
    return VisibleKeys.describe((batch_size, q_length, kv_length), end, options, make)


def pattern_of(mask_function: Callable[..., Any]) -> Pattern | None:
    """Return what a mask function of transformers computes, or None if selfattn's options cannot express it."""
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern(causal=False)
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
    if code is _TWO_SIDED and base is masking_utils.bidirectional_mask_function:
        reach = _captured(overlay)
        return Pattern(causal=False, left=reach, right=reach) if reach >= 0 else None
    return None


def _captured(function: Any) -> Any:
    """Return the first variable captured by a closure."""
    return function.__closure__[0].cell_contents


def _options(pattern: Pattern, q_length: int, offset: int, end: int) -> dict[str, Any]:
    """Return the options that hide keys, without those that would hide none."""
    options: dict[str, Any] = {}
    if pattern.causal and q_length > 1:  # a single query sees all keys before `end`
        options["causal"] = True
    far_left = pattern.left is not None and offset + q_length - 1 > pattern.left
    far_right = pattern.right is not None and end - 1 - offset > pattern.right
    if far_left or far_right:
        options["window"] = (pattern.left, pattern.right)
    return options


def _is_plain(attention_mask: torch.Tensor | None, batch_size: int) -> bool:
    if attention_mask is None:
        return True
    return bool(attention_mask.is_cpu and attention_mask.ndim == 2 and attention_mask.shape[0] == batch_size)


def _real_keys(attention_mask: torch.Tensor | None, start: int, end: int) -> NDArray[np.bool_] | None:
    """Return which keys of a slice are real tokens, (B, end), or None if all are."""
    if attention_mask is None:
        return None
    keys: NDArray[np.bool_] = attention_mask.to(torch.bool).numpy()[:, start : start + end]
    if keys.shape[1] < end:
        keys = np.pad(keys, ((0, 0), (0, end - keys.shape[1])))
    return None if keys.all() else keys


def _padding(keys: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the options that hide padding: lengths if all padding is on the right, otherwise a mask of keys."""
    lengths = np.count_nonzero(keys, axis=1)
    if np.array_equal(keys, np.arange(keys.shape[1]) < lengths[:, None]):
        return {"kv_lens": lengths.astype(np.int64, copy=False)}
    return {"mask": keys[:, None, None, :]}
