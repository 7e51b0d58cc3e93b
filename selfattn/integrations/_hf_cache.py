"""The cache for transformers: each layer has arrays or a `KVCache` that grow by themselves and are read in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .._store import storage_name
from ._hf_sparse import on_cpu
from ._hf_stored import Plain, Stored
from ._tensors import name_of

_SLACK = 128  # least number of tokens to make room for in advance


class Cache(DynamicCache):  # type: ignore[misc, unused-ignore]
    """A cache for `generate` and for models. It appends in place; a `DynamicCache` copies all its tokens at each step.

    Any attention implementation can use this cache, but only selfattn reads 8-bit tokens without converting all of
    them. For layers that keep more than keys and values, such as layers of linear attention, the cache uses
    `DynamicCache`'s own. Results are the same as with `DynamicCache`. The tensors that a layer returns are views, valid
    until the next call of `crop`, `reorder_cache` or another method that changes tokens.

    Parameters
    ----------
    config : PreTrainedConfig, optional
        The model's configuration. It tells which layers have a sliding window: these layers keep only the window's
        tokens.
    dtype : {"int8", "int4", "float32", "float16", "bfloat16"} or dtype, optional
        Storage type, as in `selfattn.KVCache`; by default the model's type. "int8" takes half the memory of bfloat16.
        The prompt attends to its own keys before they are rounded.

    Raises
    ------
    ValueError
        If `offloading` is requested: everything is in CPU memory already.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig
    >>> from selfattn.integrations.transformers import Cache
    >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    >>> cache = Cache(config)  # for `model.generate(..., past_key_values=cache)`
    >>> k = v = torch.ones((1, 4, 3, 8))
    >>> keys, values = cache.update(k, v, layer_idx=0)
    >>> cache.get_seq_length()
    3
    """

    def __init__(self, config: Any = None, *, dtype: Any = None, offloading: bool = False) -> None:
        if offloading:
            raise ValueError("selfattn: offloading is True, but a Cache keeps everything in CPU memory")
        if isinstance(dtype, torch.dtype):
            dtype = name_of(dtype)
        storage = None if dtype is None else storage_name("Cache", dtype)
        super().__init__(config=config)
        theirs: list[Any] = vars(self)["layers"]
        self.layers = [_in_place(layer, storage) for layer in theirs]
        if not theirs:  # without a configuration, layers are made on first use
            self.layer_class_to_replicate = partial(Layer, storage)
        self._kinds: dict[str, list[bool]] = {}

    # transformers sizes a mask by these properties at each step; its own versions ask every layer again.

    @property
    def is_sliding(self) -> list[bool]:
        return self._of_layers("is_sliding")

    @property
    def is_linear(self) -> list[bool]:
        return self._of_layers("is_linear")

    @property
    def is_dummy(self) -> list[bool]:
        return self._of_layers("is_dummy")

    def _of_layers(self, name: str) -> list[bool]:
        kinds: list[bool] = self._kinds.get(name, [])
        if len(kinds) != len(self.layers):
            kinds = self._kinds[name] = getattr(super(), name)
        return kinds


def _in_place(layer: Any, storage: str | None) -> Any:
    if type(layer) is DynamicLayer:
        return Layer(storage)
    if type(layer) is DynamicSlidingWindowLayer:
        return Layer(storage, layer.sliding_window)
    return layer


class Layer(DynamicLayer):  # type: ignore[misc, unused-ignore]
    """The keys and values of one layer, in memory that is replaced by larger memory when it is full.

    With a sliding window, only the newest tokens are copied to the new memory. So keys and values are always
    contiguous, unlike in a ring, and every mask and every attention implementation can be used.
    """

    def __init__(self, storage: str | None = None, sliding_window: int | None = None) -> None:
        # DynamicLayer's `__init__` is not called: it sets attributes that are properties here.
        self.storage, self.sliding_window = storage, sliding_window
        self.is_sliding, self.record_past = sliding_window is not None, False
        self._sliding_window_tensor = None if sliding_window is None else torch.tensor(sliding_window)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._memory: Any = None  # Plain or Stored
        self._held = 0  # tokens in the memory
        self.cumulative_length = 0  # tokens seen
        self._undoable = 0  # number of the newest tokens that `crop` may remove from a sliding window

    @property
    def is_initialized(self) -> bool:
        return self._memory is not None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys that later queries may need, (B, heads, tokens, head_dim)."""
        return None if self._memory is None else self._memory.part(self._held - self._needed(), self._held)[0]

    @property
    def values(self) -> torch.Tensor | None:
        """The values that later queries may need, (B, heads, tokens, value_dim)."""
        return None if self._memory is None else self._memory.part(self._held - self._needed(), self._held)[1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens, and return the keys and values that their queries may see."""
        if torch.compiler.is_compiling():
            return _update_uncompiled(self, key_states, value_states)  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                "selfattn: a Cache has no gradients: run the model under torch.no_grad() or torch.inference_mode(), "
                "or with a DynamicCache"
            )
        held, memory = self._held, self._memory
        if held == 0:
            return self._begin(key_states, value_states)
        batch, _, added, _ = key_states.shape
        if batch != memory.batch or key_states.dtype is not memory.dtype:
            raise ValueError(
                f"selfattn: keys are {key_states.dtype} of {batch} sequences, but the cache holds {memory.dtype} of "
                f"{memory.batch}"
            )
        if held + added > memory.capacity:
            memory, held = self._make_room(added)
        start = 0
        if self.sliding_window is not None:
            start = max(held - self.sliding_window + 1, 0)
        seen = memory.extend(start, held, key_states, value_states)
        self._held = held + added
        self.cumulative_length += added
        if self.record_past:
            self._undoable += added
        return seen  # type: ignore[no-any-return]

    def _begin(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the first tokens and return all of them; later queries may need only the newest."""
        added = kept = keys.shape[2]
        if self.record_past:
            self._undoable += added
        elif self.sliding_window is not None:
            kept = min(added, self.sliding_window - 1)
        self.lazy_initialization(keys[:, :, added - kept :], values[:, :, added - kept :])
        self._memory.extend(0, 0, keys[:, :, added - kept :], values[:, :, added - kept :])
        self._held = kept
        self.cumulative_length += added
        return keys, values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for tokens of this kind."""
        on_cpu("key", key_states)
        on_cpu("value", value_states)
        capacity = _with_slack(key_states.shape[2])
        if self.storage is None or self.storage == name_of(key_states.dtype):
            self._memory = Plain((key_states, value_states), capacity)
        else:
            self._memory = Stored((key_states, value_states), capacity, self.storage)

    def _make_room(self, tokens: int) -> tuple[Any, int]:
        """Move the tokens that later queries may need to memory with room for more; return it and their number."""
        needed = self._needed()
        self._replace(_with_slack(needed + tokens))
        return self._memory, needed

    def _replace(self, capacity: int, sequences: Any = slice(None)) -> None:
        needed = self._needed()
        self._memory = self._memory.moved(capacity, self._held - needed, self._held, sequences)
        self._held = needed

    def _needed(self) -> int:
        """Return how many of the newest tokens later queries may see, even after a `crop`."""
        if self.sliding_window is None:
            return self._held
        return min(self._held, self.sliding_window - 1 + self._undoable)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that the next queries may see, and the position of the first one."""
        seen = before = self.cumulative_length
        if self.sliding_window is not None:
            before = min(before, self.sliding_window - 1)
        return before + query_length, seen - before

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Keep tokens that leave a sliding window until `crop` is called, which may then remove newer ones."""
        self.record_past = self.is_sliding

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"selfattn: tokens_to_remove is {tokens_to_remove}, but a number below 0 is needed")
        removed = min(-tokens_to_remove, self.cumulative_length)
        left = self.cumulative_length - removed
        window = self.sliding_window
        if window is not None and removed and self._needed() - removed < min(left, window - 1):
            raise RuntimeError(
                f"selfattn: tokens_to_remove is {tokens_to_remove}, but the sliding window would then reach tokens "
                "that are no longer held: call activate_past_recording() before appending what may be removed"
            )
        self._held -= removed
        self.cumulative_length = left
        self._undoable = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace each sequence b by a copy of sequence ``beam_idx[b]``."""
        if self._held and len(beam_idx) == self._memory.batch:
            self._memory.reorder(beam_idx, self._held)
        else:
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self._held:
            self._replace(self._memory.capacity, torch.arange(self._memory.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences."""
        if self._held:
            self._replace(self._memory.capacity, indices)

    def offload(self) -> None:
        raise NotImplementedError("selfattn: a Cache keeps everything in CPU memory: it cannot be offloaded")

    prefetch = offload


_update_uncompiled: Any = torch.compiler.disable(Layer.update)


def _with_slack(tokens: int) -> int:
    """Return a capacity that leaves room for more tokens, so that memory is rarely replaced."""
    return tokens + max(tokens // 2, _SLACK)
