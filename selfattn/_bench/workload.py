"""Defines workloads: shapes, options, the amount of work, and the arrays that they run on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .._elements import ELEMENT_TYPES
from .._typing import Precision
from .numbers import SUFFIXES, normal
from .options import Cache, Options

Array = NDArray[Any]
Arrays = dict[str, Array]
RandomArrays = dict[str, tuple[tuple[int, ...], float]]  # shape and standard deviation

# FLOPs per element of K and V. A core with wide vectors does at least this many FLOPs while a float arrives from
# memory. Workloads with fewer FLOPs per element wait for memory.
MEMORY_BOUND_INTENSITY = 12.0

VISIBLE_SHARE = 0.75  # share of True in a random mask
SOFT_BIAS = 2.0  # standard deviation of a random bias
TILE = 256  # side of the squares of a "tiles" mask
TILE_PERIOD = 4  # one in this many squares is visible


@dataclass(frozen=True)
class Workload:
    """One named case of attention, or of a whole layer with its projections.

    Attributes
    ----------
    name, why : str
        The name, and one line about what the case represents.
    kind : {"attention", "layer"}
        "layer" is x @ w_q, w_k, w_v, attention, @ w_o, with biases.
    batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, value_dim : int
    d_model : int
        Width of x in a layer, 0 otherwise.
    dtype : str
    precision : {"highest", "high", "medium"}
    options : Options
    baseline : Options, optional
        Other options, with which selfattn's own time is compared.
    cache : Cache, optional
        The cache that holds keys and values; by default they are arrays of this dtype.
    """

    name: str
    why: str
    kind: Literal["attention", "layer"]
    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    d_model: int = 0
    dtype: str = "float32"
    precision: Precision = "highest"
    options: Options = field(default_factory=Options)
    baseline: Options | None = None
    cache: Cache | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Workload:
        """Rebuild a workload from the result of `dataclasses.asdict`, also if it went through JSON."""
        values = {own.name: record[own.name] for own in fields(cls) if own.name in record}
        for name in ("options", "baseline"):
            if values[name] is not None:
                values[name] = Options.from_dict(values[name])
        if values.get("cache") is not None:
            values["cache"] = Cache(**values["cache"])
        return cls(**values)

    def varied(self, dtype: str, precision: Precision = "highest") -> Workload:
        """Return this case in another dtype or at another precision, with a matching name."""
        suffixes = [SUFFIXES[dtype]] if dtype != self.dtype else []
        suffixes += [SUFFIXES[precision]] if precision != self.precision else []
        return replace(self, name="-".join([self.name, *suffixes]), dtype=dtype, precision=precision)

    @property
    def product_dtype(self) -> str:
        """The dtype of the products' factors, whose peak rate bounds the speed."""
        return self.dtype if self.precision == "highest" else "bfloat16"

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        """The default softmax scale, 1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ELEMENT_TYPES[self.dtype].word_bytes

    def kv_lens(self) -> NDArray[np.int64]:
        """Number of valid keys of every batch entry, shape (batch,)."""
        lens = self.options.kv_lens or (self.kv_len,) * self.batch
        return np.asarray(lens, dtype=np.int64)

    def offsets(self) -> NDArray[np.int64]:
        """Position of query 0 among the keys, per batch entry: the last query is aligned with the last key."""
        # A mask hides keys without moving the diagonal; kv_lens moves it.
        lens = self.kv_len if self.options.mask == "keys" else self.kv_lens()
        return np.broadcast_to(np.asarray(lens - self.q_len, dtype=np.int64), (self.batch,))

    def key_ranges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First visible key, and the key after the last visible one, shapes (batch, q_len).

        Takes into account causal, window and lengths, whose shape is known in advance. Ignores masks and biases, since
        no kernel can know which pairs they hide before reading them.
        """
        position = np.arange(self.q_len) + self.offsets()[:, None]
        first = np.zeros_like(position)
        after_last = np.broadcast_to(self.kv_lens()[:, None], position.shape)
        left, right = self.options.window or (None, None)
        if self.options.causal:
            after_last = np.minimum(after_last, position + 1)
        if right is not None:
            after_last = np.minimum(after_last, position + right + 1)
        if left is not None:
            first = np.maximum(first, position - left)
        return first, np.maximum(after_last, first)

    def tile_mask(self) -> NDArray[np.bool_]:
        """Return a mask in which every fourth square along rows and columns is visible, shape (q_len, kv_len)."""
        row, column = np.arange(self.q_len) // TILE, np.arange(self.kv_len) // TILE
        visible: NDArray[np.bool_] = (column - row[:, None]) % TILE_PERIOD == 0
        return visible

    def visible_pairs(self) -> int:
        """Number of visible (query, key) pairs of one head, summed over the batch.

        Takes a "tiles" mask into account, because its hidden squares can be skipped; ignores a "pairs" mask.
        """
        first, after_last = self.key_ranges()
        if self.options.mask == "tiles":
            keys = np.arange(self.kv_len)
            visible = (keys >= first[..., None]) & (keys < after_last[..., None])
            return int((visible & self.tile_mask()).sum())
        return int((after_last - first).sum())

    def attention_flops(self) -> int:
        """FLOPs of the two products: 2 (head_dim + value_dim) per head and visible pair."""
        return 2 * (self.head_dim + self.value_dim) * self.num_heads * self.visible_pairs()

    def projection_flops(self) -> int:
        """FLOPs of a layer's four projections, 2 M N K each; 0 for plain attention."""
        if self.kind == "attention":
            return 0
        query_columns = self.num_heads * (self.head_dim + self.value_dim)
        key_columns = self.num_kv_heads * (self.head_dim + self.value_dim)
        rows_by_columns = self.q_len * query_columns + self.kv_len * key_columns
        return 2 * self.batch * self.d_model * rows_by_columns

    def flops(self) -> int:
        """All FLOPs of one call."""
        return self.attention_flops() + self.projection_flops()

    def kv_bytes(self) -> int:
        """Bytes of the valid rows of K and V, each counted once; in a cache's storage dtype if there is a cache."""
        cache = self.cache or Cache()
        row = cache.row_bytes(self.dtype, self.head_dim)
        row += cache.row_bytes(self.dtype, self.value_dim) if cache.values == "own" else 0
        twice = (self.batch - 1) * cache.shared if cache.cascade else 0  # tokens of the prompt that all sequences share
        return self.num_kv_heads * row * (int(self.kv_lens().sum()) - twice)

    def operand_bytes(self) -> int:
        """Bytes of all arrays that a call must read or write, each counted once."""
        arrays = sum(math.prod(shape) for shape, _ in self._random_arrays().values())
        width = self.d_model if self.kind == "layer" else self.num_heads * self.value_dim
        mask = self.q_len * self.kv_len if self.options.mask in ("pairs", "tiles") else 0
        return (arrays + self.batch * self.q_len * width) * self.itemsize + mask

    @property
    def memory_bound(self) -> bool:
        """Whether reading K and V, rather than arithmetic, limits the speed, as in decode; always true for caches."""
        if self.cache is not None:
            return True
        if self.kind == "layer" or self.q_len >= self.kv_len:
            return False
        return self.flops() * self.itemsize < MEMORY_BOUND_INTENSITY * self.kv_bytes()

    def make_arrays(self, seed: int = 0) -> Arrays:
        """Random arrays of this workload by name; a seed always gives the same arrays.

        Returns
        -------
        dict
            q, k, v and the options that are arrays, or x, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o
            for a layer.
        """
        rng = np.random.default_rng(seed)
        arrays = {
            name: normal(rng, shape, self.dtype, deviation)
            for name, (shape, deviation) in self._random_arrays().items()
        }
        if self.cache is not None:
            for name in "kv":
                arrays[name][1:, :, : self.cache.shared] = arrays[name][:1, :, : self.cache.shared]
            if self.cache.values == "prefix":
                arrays["v"] = arrays["k"][..., : self.value_dim]
        if self.options.mask == "pairs":
            arrays["mask"] = rng.random((1, 1, self.q_len, self.kv_len)) < VISIBLE_SHARE
            arrays["mask"][..., 0] = True  # every row sees a key, since peers disagree about rows without one
        elif self.options.mask == "tiles":
            arrays["mask"] = self.tile_mask()[None, None]
        elif self.options.mask == "keys":
            arrays["mask"] = np.arange(self.kv_len) < self.kv_lens()[:, None, None, None]
        elif self.options.kv_lens is not None:
            arrays["kv_lens"] = self.kv_lens()
        if self.options.alibi:
            exponents = -8.0 * np.arange(1, self.num_heads + 1) / self.num_heads
            arrays["alibi_slopes"] = np.exp2(exponents).astype(np.float32)
        return arrays

    def _random_arrays(self) -> RandomArrays:
        """Shape and standard deviation of every array of normal random numbers."""
        if self.kind == "layer":
            return self._layer_arrays()
        key_rows = (self.batch, self.num_kv_heads, self.kv_len)
        shapes: RandomArrays = {
            "q": ((self.batch, self.num_heads, self.q_len, self.head_dim), 1.0),
            "k": ((*key_rows, self.head_dim), 1.0),
            "v": ((*key_rows, self.value_dim), 1.0),
        }
        if self.options.bias:
            shapes["bias"] = ((1, self.num_heads, self.q_len, self.kv_len), SOFT_BIAS)
        return shapes

    def _layer_arrays(self) -> RandomArrays:
        columns = {
            "q": self.num_heads * self.head_dim,
            "k": self.num_kv_heads * self.head_dim,
            "v": self.num_kv_heads * self.value_dim,
        }
        concat = self.num_heads * self.value_dim
        shapes: RandomArrays = {"x": ((self.batch, self.q_len, self.d_model), 1.0)}
        for name, width in columns.items():
            shapes[f"w_{name}"] = ((self.d_model, width), self.d_model**-0.5)
            shapes[f"b_{name}"] = ((width,), 0.1)
        shapes["w_o"] = ((concat, self.d_model), concat**-0.5)
        shapes["b_o"] = ((self.d_model,), 0.1)
        return shapes

    def attention_options(self, arrays: Arrays) -> dict[str, Any]:
        """Keyword arguments of `selfattn.attention` and of the reference for these arrays."""
        options = self.options
        wanted = {
            "mask": options.mask != "none",
            "bias": options.bias,
            "kv_lens": options.kv_lens is not None,
            "alibi_slopes": options.alibi,
        }
        given: dict[str, Any] = {name: arrays[name] for name in wanted if wanted[name] and name in arrays}
        if options.causal:
            given["causal"] = True
        if options.window is not None:
            given["window"] = options.window
        if options.softcap is not None:
            given["softcap"] = options.softcap
        return given
