"""What a call of `attention` would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from . import _core
from ._arguments import as_array, core_options
from ._attention import _DEFAULTS, ONLY_HERE, attention
from ._keywords import clean_signature, refuse_unknown
from ._mask_nodes import Mask
from ._masked import Masked, masked, options_of, rows_of
from ._typing import ExplainOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Explanation(dict[str, Any]):
    """The plan of a call. `str()` is for people, the entries are for programs; ``parts`` has the plans of parts."""

    def __str__(self) -> str:
        whole = {name: value for name, value in self.items() if name != "parts"}
        width = max(len(name) for name in whole)
        own = "\n".join(f"{name:{width}}  {value}" for name, value in whole.items())
        return "\n\n".join([own, *map(str, self.get("parts", ()))])


@clean_signature(attention, without=ONLY_HERE)
def explain(q: ArrayLike, k: ArrayLike, v: ArrayLike, **options: Unpack[ExplainOptions]) -> Explanation:
    """Tell which kernel, instruction set, blocks, threads and memory a call of `attention` would use, and why.

    Parameters
    ----------
    q, k, v : array_like
        As for `attention`; their values are not read.
    **options
        The options of `attention`, except ``return_key_mass``, ``key_indices``, ``block_indices``, ``block_size``,
        ``rope`` and ``positions``: `explain_call` takes these as well.

    Returns
    -------
    Explanation
        A dict with a readable `str()`: isa, kernel, the unit that multiplies, the reason, query_rows (per KV head) and
        block_rows (per task), key_block, range_keys (keys per task) and ranges (their number), tasks, threads and what
        decided their number, scratch_bytes_per_thread, shared_bytes, copied_blockwise (the operands that cannot be used
        in place), flops.

    See Also
    --------
    explain_call : The same for other calls.

    Raises
    ------
    TypeError, ValueError
        As `attention`.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> x = np.zeros((1, 8, 512, 64), dtype=np.float32)
    >>> sa.explain(x, x, x)["kernel"]
    'tile'
    """
    refuse_unknown(explain, options)
    known = {name: options.get(name, default) for name, default in _DEFAULTS.items()}
    q, k, v = (as_array("explain", name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    lazy = known["mask"] if isinstance(known["mask"], Mask) else None
    if lazy is None:
        return Explanation(_core.explain(q, k, v, core_options("explain", **known)))
    call = masked("explain", (q, k, v), lazy, core_options("explain", **known | {"mask": None}))
    return Explanation(_core.explain(q, k, v, call.options) if call.rest is None else _in_blocks(call))


def _in_blocks(call: Masked) -> dict[str, Any]:
    """Describe the first block of queries, and all of them together."""
    q, k, v = call.arrays
    own: dict[str, Any] = {}
    count = with_mask = read = pairs = 0
    for block in call.blocks():
        if not own:
            own = _core.explain(q[rows_of(q, block, call.options)], k, v, options_of(call, block))
        count += 1
        with_mask += block.mask is not None
        read += len(block.queries) * int((block.end - block.begin).sum())
        pairs += len(block.queries) * call.grid.kv_len * block.begin.size
    return own | {
        "blocks_of_queries": count,
        "blocks_with_mask": with_mask,
        "pairs": pairs,
        "pairs_skipped": pairs - read,
    }
