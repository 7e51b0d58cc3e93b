"""Self-attention from x to output: input projections, attention and output projection in one call of the core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike

from . import _core
from ._any_cache import AnyCache
from ._arguments import as_array, core_options, out_array
from ._attention import _DEFAULTS, ONLY_HERE, attention
from ._cache import KVCache
from ._errors import refusal
from ._head_norms import AnyNorm, head_norms
from ._immutable import Immutable
from ._keywords import clean_signature, hinted, refuse_unknown
from ._layer_inputs import Inputs, check_with_cache, layer_inputs
from ._norm import LayerNorm, RMSNorm, norm_or_none
from ._paged import PagedKVCache
from ._rope import RoPE, rope_or_none
from ._typing import Array, LayerCallOptions, No, Yes
from ._weights import Weights, head_counts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._core import Step

_VERSION = 3  # version of the pickle format
_Four = tuple[Any, Any, Any, Any]  # one value each for q, k, v and the output
_Pair = tuple[Any, Any]
_OPTIONS = {name: default for name, default in _DEFAULTS.items() if name != "layout"}


@hinted
class SelfAttention(Immutable):
    """Multi-head attention with learned projections. The weights are packed once, for this machine's kernels.

    ``y = concat_h(softmax(scale · (x w_q)_h (c w_k)_hᵀ) · (c w_v)_h) · w_o`` with ``c = context`` or ``x``
    (Vaswani et al., "Attention is all you need", 2017), each product with its bias.

    Parameters
    ----------
    w_q : array_like, shape (d_model, H·D)
        Used literally as ``x @ w_q``. A PyTorch ``Linear`` holds the transpose: pass ``linear.weight.T``. float32,
        float64, float16 or bfloat16 (of ``ml_dtypes``); all weights and inputs share one dtype. In a 16-bit dtype y is
        rounded. On units that multiply bfloat16, the operands of each step's products are rounded as well.
        Parts of one packed matrix may be given: they are read in place.
    w_k : array_like, shape (d_context, Hkv·D)
    w_v : array_like, shape (d_context, Hkv·Dv)
    w_o : array_like, shape (H·Dv, d_out), optional
        If omitted, the concatenated heads are returned.
    b_q, b_k, b_v, b_o : array_like, optional
        Biases, one number per column of the matrix.
    num_heads : int
        H.
    num_kv_heads : int, optional
        Hkv, a divisor of H; default H.
    rope : RoPE or True, optional
        Rotates q and k before attention.
    q_norm, k_norm : LayerNorm or RMSNorm, optional
        The norms of q and k, before they are rotated (Qwen 3, Gemma 3, OLMo 2). Vectors of D numbers apply to each
        head, vectors of H·D (for k: Hkv·D) numbers to all heads of a token together. Without vectors: each head.
    norm : LayerNorm or RMSNorm, optional
        The norm of x, before the projections. It is not applied to a context.
    post_norm : LayerNorm or RMSNorm, optional
        The norm of y, after a residual is added.

    Attributes
    ----------
    num_heads, num_kv_heads, head_dim, value_dim, d_model, d_context, d_out : int
    dtype : numpy.dtype
    isa : str
        The instruction set that the weights are packed for: the one active when the layer was created.

    Raises
    ------
    TypeError, ValueError
        Weights of different dtypes, or of shapes that do not fit together or to the numbers of heads.

    Notes
    -----
    A layer is immutable and may be called from many threads at once.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> w_q, w_k, w_v, w_o = rng.standard_normal((4, 32, 32), dtype=np.float32)
    >>> layer = sa.SelfAttention(w_q, w_k, w_v, w_o, num_heads=4)
    >>> layer(rng.standard_normal((2, 10, 32), dtype=np.float32), causal=True).shape
    (2, 10, 32)
    """

    __slots__ = (
        "_core", "_first_head", "_has_output", "_norms", "_rope", "d_context", "d_model", "d_out", "dtype", "head_dim",
        "isa", "num_heads", "num_kv_heads", "value_dim",
    )  # fmt: skip

    _core: _core.Layer
    _first_head: int  # for dropout: if the heads are some of a larger layer, their first one there
    _has_output: bool
    _norms: tuple[AnyNorm, AnyNorm, AnyNorm, AnyNorm]  # of x, y, q and k
    _rope: RoPE | None
    d_context: int
    d_model: int
    d_out: int
    dtype: np.dtype[Any]
    head_dim: int
    isa: str
    num_heads: int
    num_kv_heads: int
    value_dim: int

    def __init__(
        self,
        w_q: ArrayLike,
        w_k: ArrayLike,
        w_v: ArrayLike,
        w_o: ArrayLike | None = None,
        *,
        b_q: ArrayLike | None = None,
        b_k: ArrayLike | None = None,
        b_v: ArrayLike | None = None,
        b_o: ArrayLike | None = None,
        num_heads: int,
        num_kv_heads: int | None = None,
        rope: RoPE | bool | None = None,
        norm: LayerNorm | RMSNorm | None = None,
        post_norm: LayerNorm | RMSNorm | None = None,
        q_norm: LayerNorm | RMSNorm | None = None,
        k_norm: LayerNorm | RMSNorm | None = None,
    ) -> None:
        matrices, biases = (w_q, w_k, w_v, w_o), (b_q, b_k, b_v, b_o)
        self._build(
            "SelfAttention", matrices, biases, (num_heads, num_kv_heads), rope, (norm, post_norm, q_norm, k_norm)
        )

    def _build(self, function: str, weights: _Four, biases: _Four, counts: _Pair, rope: Any, norms: _Four) -> None:
        heads, kv_heads = counted = head_counts(function, *counts)
        w = Weights.check(function, weights, heads, kv_heads)
        b = w.biases(function, biases)
        description = rope_or_none(function, rope)
        rotation = None if description is None else description.for_core(function, w.head_dim)
        d_out = heads * w.value_dim if w.o is None else w.o.shape[1]
        norm, post_norm, q_norm, k_norm = norms
        pre = norm_or_none(function, "norm", norm, w.q.shape[0], w.q.dtype)
        post = norm_or_none(function, "post_norm", post_norm, d_out, w.q.dtype)
        if post is not None and w.o is None:
            raise refusal(ValueError, function, "post_norm", " is given without w_o")
        of_heads = head_norms(function, (q_norm, k_norm), counted, w.head_dim, w.q.dtype)
        q, k = of_heads["q"], of_heads["k"]
        core = _core.make_layer(
            _core.UnpackedWeights(w_q=w.q, w_k=w.k, w_v=w.v, w_o=w.o, b_q=b["q"], b_k=b["k"], b_v=b["v"], b_o=b["o"]),
            _core.LayerNorms(norm=pre, post_norm=post, q_norm=q.core, k_norm=k.core, q_width=q.width, k_width=k.width),
            heads, kv_heads, rotation,
        )  # fmt: skip
        self._set({
            "_core": core, "_first_head": 0, "_has_output": w.o is not None, "_norms": norms, "_rope": description,
            "d_context": w.k.shape[0], "d_model": w.q.shape[0], "d_out": d_out, "dtype": w.q.dtype,
            "head_dim": w.head_dim, "isa": _core.layer_isa(core), "num_heads": heads, "num_kv_heads": kv_heads,
            "value_dim": w.value_dim,
        })  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the unpacked weights: unpickling packs them for the machine it runs on."""
        counts = (self.num_heads, self.num_kv_heads)
        return _load, (type(self), _VERSION, *self._unpacked(), counts, self._rope, self._norms)

    def _unpacked(self) -> tuple[_Four, tuple[Any, ...]]:
        """Return copies of the matrices and the biases."""
        to = _core.UnpackedWeights(
            w_q=np.empty((self.d_model, self.num_heads * self.head_dim), self.dtype),
            w_k=np.empty((self.d_context, self.num_kv_heads * self.head_dim), self.dtype),
            w_v=np.empty((self.d_context, self.num_kv_heads * self.value_dim), self.dtype),
            w_o=np.empty((self.num_heads * self.value_dim, self.d_out), self.dtype) if self._has_output else None,
        )
        _core.unpack_layer(self._core, to)
        # Biases are kept in the computation type, which represents every number of the narrower dtype exactly.
        biases = (None if b is None else b.astype(self.dtype) for b in (to.b_q, to.b_k, to.b_v, to.b_o))
        return (to.w_q, to.w_k, to.w_v, to.w_o), tuple(biases)

    def __repr__(self) -> str:
        return (
            f"SelfAttention(d_model={self.d_model}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
            f"d_out={self.d_out}, dtype={self.dtype}, isa={self.isa!r})"
        )

    # fmt: off
    @overload
    def __call__(
        self, x: ArrayLike, *, return_lse: No = ..., return_weights: No = ..., **options: Unpack[LayerCallOptions]
    ) -> Array: ...
    @overload
    def __call__(
        self, x: ArrayLike, *, return_lse: Yes, return_weights: No = ..., **options: Unpack[LayerCallOptions]
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self, x: ArrayLike, *, return_lse: No = ..., return_weights: Yes, **options: Unpack[LayerCallOptions]
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self, x: ArrayLike, *, return_lse: Yes, return_weights: Yes, **options: Unpack[LayerCallOptions]
    ) -> tuple[Array, Array, Array]: ...
    @overload
    def __call__(
        self, x: ArrayLike, *, return_lse: bool = ..., return_weights: bool = ..., **options: Unpack[LayerCallOptions]
    ) -> Any: ...
    # fmt: on
    @clean_signature(attention, without=("layout", *ONLY_HERE))
    def __call__(
        self,
        x: ArrayLike,
        *,
        context: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        cache: KVCache | PagedKVCache | None = None,
        sequences: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        out: Array | None = None,
        **options: Any,
    ) -> Any:
        """Apply the layer to x.

        Parameters
        ----------
        x : array_like, shape (..., S, d_model)
            The input of the queries, and of the keys and values unless `context` is given.
        context : array_like, shape (..., Sk, d_context), optional
            The input of the keys and values (cross-attention).
        positions : integer array, shape (S,) or (..., S), optional
            Positions of the tokens of x, for `rope`; default 0, 1, 2, ... (with a cache: their positions in their
            sequences). With coordinates as in `apply_rope` if the rope has `axes`. The position of a context's token
            is its index.
        cache : KVCache or PagedKVCache, optional
            x is (batch, S, d_model): the S newest tokens of each sequence. Their keys and values are appended, and
            they attend to everything in the cache, causally unless ``causal=False``. `mask` then covers the S newest
            tokens only, as in `attention_with_kvcache`, and `kv_starts` counts the cache's tokens. After an error the
            cache is unchanged, except that a ring may have lost tokens that no later query can see.
        sequences : sequence of int
            With a PagedKVCache: the id of the sequence of each row of x.
        residual : array_like, shape of y, optional
            Added to y; often x itself. Needs w_o.
        out : ndarray, optional
            Array for y. May be `residual` itself.
        **options
            The options of `attention` except `layout`, `rope`, `return_key_mass`, `key_indices`, `block_indices` and
            `block_size`. Shapes are as for the heads: mask and bias broadcast to (..., H, S, Sk). If there is neither a
            context nor a cache, queries and keys are the same tokens: kv_lens also serves as q_lens, and query i is
            aligned with key i unless q_offset or both lengths are given.

        Returns
        -------
        y : ndarray, shape (..., S, d_out)
            With `return_lse` and `return_weights` a tuple, as from `attention`.
        """
        if cache is None:
            if sequences is not None:
                raise refusal(ValueError, "SelfAttention", "sequences", " is given without a cache")
            return self._call("SelfAttention", (x, context, positions, residual), out, options)
        return self._step((x, context, positions, residual), cache, sequences, out, options)

    def _step(self, inputs: Inputs, cache: AnyCache, sequences: Any, out: Any, options: dict[str, Any]) -> Any:
        function = "SelfAttention"
        x, context, positions, residual = inputs
        x = as_array(function, "x", x)
        check_with_cache(function, cache, context, options)
        options = {"causal": True, **options}
        tokens = x.shape[-2] if x.ndim > 1 else 0

        def call(step: Step) -> Any:
            return self._call(function, (x, context, positions, residual), out, options, step)

        return cache._run(function, sequences, tokens, call)

    def _call(self, function: str, inputs: Inputs, out: Any, options: dict[str, Any], step: Step | None = None) -> Any:
        if not options.keys() <= _OPTIONS.keys():
            refuse_unknown(SelfAttention.__call__, options)
        values = core_options(function, **options)
        values.first_head = self._first_head
        given = layer_inputs(function, self, inputs, step)
        if out is not None:
            out = out_array(function, out)
        return _core.call_layer(self._core, function, given, out, values)


def _load(cls: type[SelfAttention], version: int, *parts: Any) -> SelfAttention:
    if version != _VERSION:
        raise ValueError(f"SelfAttention: the pickle has version {version!r}, but {_VERSION} is known")
    layer = cls.__new__(cls)
    layer._build("SelfAttention", *parts)
    return layer
