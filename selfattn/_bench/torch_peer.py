"""PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .dense import additive_mask, range_mask, square_causal
from .numbers import numpy_dtype
from .peer import MAX_SCORES_BYTES, Peer, Run
from .workload import Array, Arrays, Workload


class PyTorch(Peer):
    """SDPA under inference_mode; every mask is prepared beforehand in the form that is fastest for SDPA."""

    name, label, module = "pytorch", "PyTorch", "torch"

    def why_not(self, workload: Workload) -> str:
        """See `Peer.why_not`."""
        if workload.options.softcap is not None:
            return "SDPA has no softcap"
        heads = workload.num_heads if workload.options.alibi else 1
        pairs = heads * workload.q_len * workload.kv_len
        if not self._plain(workload) and pairs * workload.itemsize > MAX_SCORES_BYTES:
            return "its mask would take more than 2 GiB"
        return ""

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        torch = importlib.import_module("torch")
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(workload.precision)
        options = self._sdpa_options(torch, workload, arrays)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if workload.kind == "layer":
            return self._layer(torch, workload, arrays, options)
        q, k, v = (tensor(torch, arrays[name]) for name in "qkv")

        def run() -> Any:
            with torch.inference_mode():
                return sdpa(q, k, v, **options)

        return readable(torch, workload, run)

    def _plain(self, workload: Workload) -> bool:
        """Whether SDPA needs no mask array."""
        if square_causal(workload):
            return True
        options = workload.options
        arrays_needed = options.mask != "none" or options.bias or options.alibi
        return not arrays_needed and range_mask(workload) is None

    def _sdpa_options(self, torch: Any, workload: Workload, arrays: Arrays) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if workload.group_size > 1:
            options["enable_gqa"] = True
        if square_causal(workload):
            options["is_causal"] = True
        elif not self._plain(workload):
            options["attn_mask"] = tensor(torch, self._mask(workload, arrays))
        return options

    @staticmethod
    def _mask(workload: Workload, arrays: Arrays) -> Array:
        """Pass a boolean mask unchanged; convert everything else to an additive mask once."""
        options = workload.options
        computed = options.causal or options.window or options.bias or options.alibi
        if "mask" in arrays and not computed:
            return arrays["mask"]
        added = additive_mask(workload, arrays)
        assert added is not None
        return added

    @staticmethod
    def _layer(torch: Any, workload: Workload, arrays: Arrays, options: dict[str, Any]) -> Run:
        """One Linear for q, k and v, SDPA, and a Linear, as in PyTorch's own layer."""
        functional = torch.nn.functional
        x = tensor(torch, arrays["x"])
        w_in = np.concatenate([arrays[f"w_{name}"] for name in "qkv"], axis=1).T
        b_in = np.concatenate([arrays[f"b_{name}"] for name in "qkv"])
        w_in, b_in = tensor(torch, np.ascontiguousarray(w_in)), tensor(torch, b_in)
        w_out = tensor(torch, np.ascontiguousarray(arrays["w_o"].T))
        b_out = tensor(torch, arrays["b_o"])
        heads = (workload.num_heads, workload.num_kv_heads, workload.num_kv_heads)
        dims = (workload.head_dim, workload.head_dim, workload.value_dim)
        widths = [count * dim for count, dim in zip(heads, dims, strict=True)]

        def run() -> Any:
            with torch.inference_mode():
                projected = functional.linear(x, w_in, b_in).split(widths, dim=-1)
                q, k, v = (
                    part.unflatten(-1, (count, -1)).transpose(1, 2)
                    for part, count in zip(projected, heads, strict=True)
                )
                out = functional.scaled_dot_product_attention(q, k, v, **options)
                return functional.linear(out.transpose(1, 2).flatten(2), w_out, b_out)

        return readable(torch, workload, run)


def tensor(torch: Any, array: Array) -> Any:
    """Return a tensor over the same memory; PyTorch does not accept NumPy's bfloat16 directly."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def readable(torch: Any, workload: Workload, run: Run) -> Run:
    """Make the result of a call readable for NumPy, whatever its dtype."""
    return (lambda: _BFloat16(torch, run())) if workload.dtype == "bfloat16" else run


class _BFloat16:
    """A bfloat16 tensor that NumPy can convert to an array of `ml_dtypes.bfloat16`."""

    __slots__ = ("tensor", "torch")

    def __init__(self, torch: Any, tensor: Any) -> None:
        self.torch, self.tensor = torch, tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return an array over the same memory."""
        bits: Array = self.tensor.view(self.torch.uint16).numpy()
        return bits.view(numpy_dtype("bfloat16"))
