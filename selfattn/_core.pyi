"""The compiled core. It relies on argument checks of the Python layer; use the public functions instead.

Its ValueErrors and TypeErrors about arguments have an attribute ``message_parts``; see `_errors.py`.
"""

from collections.abc import Callable
from typing import Any, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._elements import ElementFields

# The numbers by which the core knows the names that users pass.
Layout = NewType("Layout", int)
Precision = NewType("Precision", int)
DType = NewType("DType", int)
Activation = NewType("Activation", int)
LAYOUTS: dict[str, Layout]
PRECISIONS: dict[str, Precision]
ELEMENT_TYPES: dict[str, ElementFields]
ACTIVATIONS: dict[str, Activation]

# The names of the fields of Options, and of those that are arrays.
OPTIONS: tuple[str, ...]
ARRAY_OPTIONS: tuple[str, ...]

class Options:
    """All arguments of a call except its operands; csrc/option_list.h has the defaults."""

    mask: NDArray[Any] | None
    bias: NDArray[Any] | None
    q_offset: NDArray[np.int64] | None
    q_lens: NDArray[np.int64] | None
    kv_lens: NDArray[np.int64] | None
    kv_starts: NDArray[np.int64] | None
    prefix_lens: NDArray[np.int64] | None
    alibi_slopes: NDArray[np.float64] | None
    sinks: NDArray[np.float64] | None
    distance_bias: NDArray[np.float64] | None
    layout: Layout
    causal: bool
    window_left: int
    window_right: int
    chunk: int
    scale: float | None
    softcap: float | None
    precision: Precision
    distance_origin: int
    dropout: float
    seed: int
    first_entry: int
    first_head: int
    first_query: int
    first_key: int
    return_lse: bool
    return_weights: bool
    return_key_mass: bool
    exact: bool
    same_tokens: bool
    num_threads: int

    def copy(self) -> Options: ...

# The operands of calls that take many. Their fields are those of csrc/bindings/operands.h.

class Rope:
    """A checked `RoPE` for heads of one size: `frequencies`, or the caller's cosines and sines."""

    frequencies: NDArray[Any] | None
    cosines: NDArray[Any] | None
    sines: NDArray[Any] | None
    axes: NDArray[Any] | None
    scaling: float
    interleaved: bool

    def __init__(
        self,
        *,
        frequencies: NDArray[np.float64] | None = None,  # for each pair
        cosines: NDArray[Any] | None = None,  # for each position and pair
        sines: NDArray[Any] | None = None,
        axes: NDArray[np.int64] | None = None,  # for each pair
        scaling: float = 1.0,
        interleaved: bool = False,
    ) -> None: ...

class CacheInputs:
    """Operands of `attend_cache`."""

    q: NDArray[Any]
    k: NDArray[Any] | None
    v: NDArray[Any] | None
    rope: Rope | None
    positions: NDArray[Any] | None
    unrounded: bool
    skipped: int
    tokens: int

    def __init__(
        self,
        *,
        q: NDArray[Any],
        k: NDArray[Any] | None = None,
        v: NDArray[Any] | None = None,
        rope: Rope | None = None,
        positions: NDArray[Any] | None = None,
        unrounded: bool = False,  # return out in the type of computation
        skipped: int = 0,  # tokens at the start of paged sequences that are not read; a multiple of the page size
        tokens: int = -1,  # tokens of k and v; -1: as many as queries
    ) -> None: ...

class LayerInputs:
    """Operands of `call_layer`."""

    x: NDArray[Any]
    context: NDArray[Any] | None
    positions: NDArray[Any] | None
    residual: NDArray[Any] | None
    step: Step | None

    def __init__(
        self,
        *,
        x: NDArray[Any],
        context: NDArray[Any] | None = None,
        positions: NDArray[Any] | None = None,
        residual: NDArray[Any] | None = None,
        step: Step | None = None,
    ) -> None: ...

class UnpackedWeights:
    """Weights and biases of a layer."""

    w_q: NDArray[Any]
    w_k: NDArray[Any]
    w_v: NDArray[Any]
    w_o: NDArray[Any] | None
    b_q: NDArray[Any] | None
    b_k: NDArray[Any] | None
    b_v: NDArray[Any] | None
    b_o: NDArray[Any] | None

    def __init__(
        self,
        *,
        w_q: NDArray[Any],
        w_k: NDArray[Any],
        w_v: NDArray[Any],
        w_o: NDArray[Any] | None,
        b_q: NDArray[Any] | None = None,
        b_k: NDArray[Any] | None = None,
        b_v: NDArray[Any] | None = None,
        b_o: NDArray[Any] | None = None,
    ) -> None: ...

class LayerNorms:
    """Norms of a layer: of x, of the result, of queries and of keys."""

    norm: Norm | None
    post_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    q_width: int
    k_width: int

    def __init__(
        self,
        *,
        norm: Norm | None,
        post_norm: Norm | None,
        q_norm: Norm | None,
        k_norm: Norm | None,
        q_width: int,  # numbers that q_norm normalises together
        k_width: int,
    ) -> None: ...

class UnpackedLinear:
    """Weights and biases of a linear layer and of its gate."""

    w: NDArray[Any]
    scales: NDArray[np.float32] | None
    b: NDArray[Any] | None
    w_gate: NDArray[Any] | None
    gate_scales: NDArray[np.float32] | None
    b_gate: NDArray[Any] | None

    def __init__(
        self,
        *,
        w: NDArray[Any],
        scales: NDArray[np.float32] | None = None,  # (groups, columns), if w holds codes
        b: NDArray[Any] | None = None,
        w_gate: NDArray[Any] | None = None,
        gate_scales: NDArray[np.float32] | None = None,
        b_gate: NDArray[Any] | None = None,
    ) -> None: ...

class CacheTokens:
    """The keys or values of a cache."""

    rows: NDArray[Any]
    scales: NDArray[np.float32] | None
    width: int

    def __init__(
        self,
        *,
        rows: NDArray[Any],  # (pages, heads, page_size, words)
        scales: NDArray[np.float32] | None = None,  # (pages, heads, page_size), of codes
        width: int,  # elements in a row
    ) -> None: ...

class NormForm:
    """A norm; its vectors are contiguous and have the type of computation."""

    weight: NDArray[Any] | None
    bias: NDArray[Any] | None
    eps: float
    centred: bool

    def __init__(
        self, *, weight: NDArray[Any] | None, bias: NDArray[Any] | None, eps: float, centred: bool
    ) -> None: ...

class FeedForwardWeights:
    """The layers and the norms of a feed-forward network."""

    first: Linear
    second: Linear
    norm: Norm | None
    post_norm: Norm | None

    def __init__(self, *, first: Linear, second: Linear, norm: Norm | None, post_norm: Norm | None) -> None: ...

class VarlenInputs:
    """Operands of `attention_varlen`, and the options that differ from sequence to sequence."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    cu_seqlens_q: NDArray[np.int64]
    cu_seqlens_k: NDArray[np.int64]
    mask: list[NDArray[Any] | None] | None
    bias: list[NDArray[Any] | None] | None
    q_offset: NDArray[np.int64] | None
    kv_starts: NDArray[np.int64] | None
    prefix_lens: NDArray[np.int64] | None
    alibi_slopes: NDArray[np.float64] | None

    def __init__(
        self,
        *,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        cu_seqlens_q: NDArray[np.int64],
        cu_seqlens_k: NDArray[np.int64],
        mask: list[NDArray[Any] | None] | None = None,
        bias: list[NDArray[Any] | None] | None = None,
        q_offset: NDArray[np.int64] | None = None,  # (sequences,)
        kv_starts: NDArray[np.int64] | None = None,  # (sequences,)
        prefix_lens: NDArray[np.int64] | None = None,  # (sequences,)
        alibi_slopes: NDArray[np.float64] | None = None,  # (sequences, heads)
    ) -> None: ...

class RelativeInputs:
    """Operands of relative attention in addition to q, k and v."""

    r: NDArray[Any]
    u: NDArray[np.float64]
    w: NDArray[np.float64]
    r_origin: int

    def __init__(self, *, r: NDArray[Any], u: NDArray[np.float64], w: NDArray[np.float64], r_origin: int) -> None: ...

class GradientInputs:
    """The results of a forward pass, and the gradients of these."""

    grad_out: NDArray[Any]
    out: NDArray[Any]
    lse: NDArray[Any] | None  # None is refused
    grad_lse: NDArray[Any] | None
    grad_weights: NDArray[Any] | None

    def __init__(
        self,
        *,
        grad_out: NDArray[Any],
        out: NDArray[Any],
        lse: NDArray[Any] | None,
        grad_lse: NDArray[Any] | None = None,
        grad_weights: NDArray[Any] | None = None,
    ) -> None: ...

Heads: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]  # q, k, v

# Capsules: objects that the core keeps between calls.
Layer = NewType("Layer", object)
Linear = NewType("Linear", object)
Norm = NewType("Norm", object)
AttentionState = NewType("AttentionState", object)
CacheStore = NewType("CacheStore", object)  # the arrays of a cache
Ledger = NewType("Ledger", object)  # the lengths of a cache whose sequences have one page each
PageTable = NewType("PageTable", object)  # the pages of all sequences of a call in one array

PagePool = NewType("PagePool", object)  # the pages of a PagedKVCache

class Step:
    """The cache of one call, and what `undo` needs to take the call back."""

    store: CacheStore
    sequences: Ledger | PageTable | PagePool
    ids: list[int] | None

    def __init__(
        self,
        *,
        store: CacheStore,
        sequences: Ledger | PageTable | PagePool,
        ids: list[int] | None = None,  # of the sequences in a pool
    ) -> None: ...

def make_layer(
    weights: UnpackedWeights, norms: LayerNorms, num_heads: int, num_kv_heads: int, rope: Rope | None, /
) -> Layer: ...
def call_layer(
    layer: Layer,
    function: str,
    inputs: LayerInputs,
    out: NDArray[Any] | None,
    options: Options,
    /,
) -> Any: ...

# Fills the matrices and sets the biases; w_o may be None only if the layer has none.
def unpack_layer(layer: Layer, weights: UnpackedWeights, /) -> None: ...

# Checks x and context against the weights, as `call_layer` does.
def check_layer_inputs(
    function: str, x: NDArray[Any], context: NDArray[Any] | None, w_q: NDArray[Any], w_k: NDArray[Any], /
) -> None: ...
def layer_isa(layer: Layer, /) -> str: ...
def attention(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], out: NDArray[Any] | None, options: Options, /
) -> Any: ...
def attention_for(function: str, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], options: Options, /) -> Any: ...
def attention_backward(
    function: str,
    operands: Heads,
    given: GradientInputs,
    wrt: tuple[str, ...],
    options: Options,
    /,
) -> dict[str, NDArray[Any]]: ...

# Check the gradient of a result: the shape of `like`; `check_gradient` also the dtype of `like` or that of computation.
def check_shape(function: str, name: str, array: NDArray[Any], like: NDArray[Any], /) -> None: ...
def check_gradient(function: str, name: str, array: NDArray[Any], like: NDArray[Any], /) -> None: ...
def attention_varlen(function: str, inputs: VarlenInputs, out: NDArray[Any] | None, options: Options, /) -> Any: ...
def attention_varlen_backward(
    function: str,
    inputs: VarlenInputs,
    given: GradientInputs,  # without grad_weights
    wrt: tuple[str, ...],
    options: Options,
    /,
) -> dict[str, Any]: ...
def relative_attention(
    function: str,
    operands: Heads,
    inputs: RelativeInputs,
    out: NDArray[Any] | None,
    options: Options,
    /,
) -> Any: ...
def relative_attention_backward(
    function: str,
    operands: Heads,
    inputs: RelativeInputs,
    given: GradientInputs,
    wrt: tuple[str, ...],
    options: Options,
    /,
) -> dict[str, NDArray[Any]]: ...
def make_cache_store(
    *,
    k: CacheTokens,
    v: CacheTokens,
    dtype: DType,
    window: int,  # the largest distance that queries may look to the left; -1: the cache keeps all tokens
) -> CacheStore: ...
def unpack(rows: NDArray[Any], dtype: DType, width: int, /) -> NDArray[np.float32]: ...
def make_ledger(
    *,
    copies: NDArray[np.int64],  # (2, 2, sequences): two copies of (length, first token still held)
    active: NDArray[np.int64],  # (1,): the copy that is valid
) -> Ledger: ...
def is_possible(start: int, length: int, capacity: int, ring: bool, /) -> bool: ...
def make_page_table(
    *,
    pages: NDArray[np.int32],  # (sequences, pages), C-contiguous, also for the tokens that the call appends
    lengths: NDArray[np.int64],  # a call that appends writes the new lengths
    starts: NDArray[np.int64] | None,  # the first token still held
) -> PageTable: ...
def append(function: str, step: Step, k: NDArray[Any], v: NDArray[Any], /) -> None: ...
def attend_cache(
    function: str, step: Step, inputs: CacheInputs, out: NDArray[Any] | None, options: Options, /
) -> Any: ...

# Takes the last call on a step back if it has committed.
def undo(step: Step, /) -> None: ...

# Prepares the step of a call that has returned for another call.
def renew(step: Step, sequences: Ledger | PagePool, ids: list[int] | None, /) -> None: ...

# Changes of lengths by one call.
def reorder(store: CacheStore, ledger: Ledger, index: NDArray[np.int64], /) -> None: ...
def truncate(store: CacheStore, ledger: Ledger, lengths: NDArray[np.int64], /) -> None: ...
def set_lengths(
    store: CacheStore, ledger: Ledger, lengths: NDArray[np.int64], starts: NDArray[np.int64], /
) -> None: ...

# The sequences of a pool; ids are integers of any size.
def make_page_pool(num_pages: int, page_size: int, next_id: int, /) -> PagePool: ...
def add_sequence(pool: PagePool, /) -> int: ...
def fork_sequence(pool: PagePool, id: int, /) -> int: ...
def truncate_sequence(pool: PagePool, id: int, length: int, window: int, /) -> None: ...  # window -1: none
def free_sequence(pool: PagePool, id: int, /) -> None: ...
def length_of(pool: PagePool, id: int, /) -> int: ...
def sequence(pool: PagePool, id: int, /) -> tuple[int, int, NDArray[np.int32]]: ...  # length, first token held, pages
def live_sequences(pool: PagePool, /) -> tuple[int, ...]: ...
def next_id(pool: PagePool, /) -> int: ...
def num_free_pages(pool: PagePool, /) -> int: ...

# Returns False for an impossible sequence. Its pages are counted by `recount_pages`.
def put_sequence(pool: PagePool, id: int, length: int, start: int, pages: NDArray[np.int32], /) -> bool: ...
def recount_pages(pool: PagePool, /) -> None: ...

# The leading pages that all sequences of a step share, and the lengths of the sequences.
def common_pages(function: str, step: Step, /) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...

# `like`, the argument of this name, has the shape and the dtype that out must have.
def check_out(function: str, out: NDArray[Any], like: NDArray[Any], name: str, /) -> None: ...
def check_own_memory(function: str, name: str, part: str, array: NDArray[Any], /) -> None: ...
def merge_states(
    outs: list[NDArray[Any]], lses: list[NDArray[Any]], out: NDArray[Any], lse: NDArray[Any], num_threads: int, /
) -> None: ...

# `options` may have mask and bias, for all keys; they are only checked. `own`: the same without mask and bias.
def make_state(q: NDArray[Any], kv_len: int, first: int, options: Options, own: Options, /) -> AttentionState: ...
def absorb(
    state: AttentionState,
    k: NDArray[Any],
    v: NDArray[Any],
    first: int,
    mask: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    /,
) -> None: ...
def next_key(state: AttentionState, /) -> int: ...
def state_result(state: AttentionState, out: NDArray[Any] | None, /) -> tuple[NDArray[Any], NDArray[Any]]: ...

xla_attention: object  # capsules: handlers for XLA
xla_attention_backward: object

# The bits of the handlers' attributes `given` and `wrt`, in the order of the arguments and of the results.
XLA_GIVEN: dict[str, int]
XLA_WANTED: dict[str, int]

# Makes a call that computes nothing, and describes its regions; a region of attention as `explain` does.
def rehearse(call: Callable[[], Any], /) -> list[dict[str, Any]]: ...
def explain(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], options: Options, /) -> dict[str, Any]: ...

# (..., q_len, 3): a query's position, and the begin and the end of the keys that it may see, before mask and bias.
def visible_keys(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], options: Options, /) -> NDArray[np.int64]: ...

# The precision counts for codes only.
def make_linear(weights: UnpackedLinear, activation: Activation, precision: Precision, /) -> Linear: ...
def call_linear(
    layer: Linear,
    function: str,
    x: NDArray[Any],
    residual: NDArray[Any] | None,
    out: NDArray[Any] | None,
    num_threads: int,
    /,
) -> NDArray[Any]: ...
def linear_isa(layer: Linear, /) -> str: ...

# Fills the matrices and scales, and sets the biases.
def unpack_linear(layer: Linear, weights: UnpackedLinear, /) -> None: ...
def call_feed_forward(
    weights: FeedForwardWeights,
    function: str,
    x: NDArray[Any],
    residual: NDArray[Any] | None,
    out: NDArray[Any] | None,
    num_threads: int,
    /,
) -> NDArray[Any]: ...
def make_norm(form: NormForm, /) -> Norm: ...
def normalise(
    form: NormForm, function: str, x: NDArray[Any], residual: NDArray[Any] | None, out: NDArray[Any] | None, /
) -> NDArray[Any]: ...
def apply_rope(
    x: NDArray[Any],
    positions: NDArray[Any] | None,
    out: NDArray[Any],
    rope: Rope,
    inverse: bool,
    num_threads: int,
    /,
) -> None: ...
def isas() -> list[str]: ...
def active_isa() -> str: ...
def select_isa(name: str, /) -> None: ...
def default_threads() -> tuple[int, str]: ...
def set_default_threads(count: int, /) -> None: ...
def parallel_backend() -> str: ...
def share_runtime(run: int, threads: int, /) -> None: ...
def affinity_count() -> int: ...
def cgroup_quota(root: str, /) -> float: ...
def cgroup_cpus(root: str, /) -> int: ...
def subnormals_survive() -> bool: ...
def build_config() -> dict[str, Any]: ...
def measure_product_peak(isa: str, dtype: str, seconds: float, /) -> float: ...
def measure_read_bandwidth(num_bytes: int, num_threads: int, seconds: float, /) -> float: ...
