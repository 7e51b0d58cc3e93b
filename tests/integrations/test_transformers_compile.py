"""Described masks where Python overrides do not reach: compilers, scripts, transforms, and direct reads of memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

import transformers_models as models  # noqa: E402

from selfattn.integrations._hf_mask import VisibleKeys, make_mask  # noqa: E402
from selfattn.integrations.transformers import register  # noqa: E402

# torch.compile's own code, and torch.jit, warn.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    register()
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def described() -> Any:
    real = torch.ones((2, 6), dtype=torch.bool)
    real[0, 4:] = False
    real[0, 0] = False
    mask = make_mask(2, 6, 6, attention_mask=real)
    assert type(mask) is VisibleKeys
    assert mask.made is None
    return mask


def dense() -> Any:
    return described().dense()


def total(x: torch.Tensor) -> torch.Tensor:
    return x.sum()


def softmax_of_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x + mask).softmax(-1)


READERS = {
    "script": lambda mask: torch.jit.script(total)(mask),
    "trace": lambda mask: torch.jit.trace(total, (mask,))(mask),
    "vmap": lambda mask: torch.vmap(total)(mask),
    "grad": lambda mask: torch.func.grad(lambda x: (x * mask).sum())(torch.ones(6)),
    "data": lambda mask: mask.data,
    "detach": lambda mask: mask.detach(),
    "view": lambda mask: mask.view(torch.uint8),
    "set_": lambda mask: torch.empty(0, dtype=torch.bool).set_(mask),
    "numpy": lambda mask: torch.from_numpy(mask.numpy()),
    "array": lambda mask: torch.from_numpy(np.array(mask)),
    "list": lambda mask: torch.tensor(mask.tolist()),
    "dlpack": lambda mask: torch.from_dlpack(mask),
    "data_ptr": lambda mask: torch.tensor(mask.data_ptr() == mask.dense().data_ptr()),
    "shared": lambda mask: mask.share_memory_() & True,
    "copy": lambda mask: copy.copy(mask),
    "deepcopy": lambda mask: copy.deepcopy(mask),
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
    "rows": lambda mask: torch.stack(list(mask)),
}


@pytest.mark.parametrize("how", READERS)
def test_everything_reads_the_dense_mask(how: str) -> None:
    found = READERS[how](described())
    wanted = torch.tensor(True) if how == "data_ptr" else READERS[how](dense())
    assert torch.equal(found, wanted)
    assert repr(described()).count("True") == int(dense().sum())


CHANGES = {
    "item": lambda mask: mask.__setitem__((..., 1), False),
    "fill": lambda mask: mask.fill_(True),
    "and": lambda mask: mask.__iand__(torch.tensor(False)),
    "script": lambda mask: torch.jit.script(torch.nn.Identity())(mask).logical_not_(),
}


@pytest.mark.parametrize("how", CHANGES)
def test_changes_count_and_return_the_mask(how: str) -> None:
    mask, wanted = described(), dense()
    assert CHANGES[how](mask) in (None, mask) if how == "item" else CHANGES[how](mask) is mask
    CHANGES[how](wanted)
    assert torch.equal(mask & True, wanted)
    assert mask.contiguous() is mask


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_functions_take_described_masks(backend: str) -> None:
    def broken(x: Any, mask: Any) -> Any:
        x = x * 2
        torch._dynamo.graph_break()
        return x * mask, mask

    def changing(x: Any, mask: Any) -> Any:
        mask[..., 1] = False
        return x * mask

    x = models.normal(2, 4, 6, 6)
    shape = torch.compile(lambda x, mask: x * mask.shape[0], backend=backend)
    assert torch.equal(shape(x, described()), x * 2)
    mask = described()
    found, same = torch.compile(broken, backend=backend)(x, mask)
    assert same is mask
    assert torch.equal(found, x * 2 * dense())
    assert torch.allclose(
        torch.compile(softmax_of_sum, backend=backend)(x, described()), softmax_of_sum(x, described())
    )
    for _ in range(2):
        mask, wanted = described(), dense()
        assert torch.equal(torch.compile(changing, backend=backend)(x, mask), changing(x, wanted))
        assert torch.equal(mask & True, wanted)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_functions_add_parts_of_described_masks(backend: str) -> None:
    def eager_attention(x: Any, mask: Any) -> Any:
        return (x + mask[:, :, :, : x.shape[-1]]).softmax(-1)

    def parts(x: Any, mask: Any) -> Any:
        return x, mask[:, :, 1:]

    x = models.normal(2, 4, 6, 4)
    wanted = x.masked_fill(~dense()[..., :4], -torch.inf).softmax(-1)
    seen = dense()[..., :4].any(-1).expand(2, 4, 6)
    compiled = torch.compile(eager_attention, backend=backend)
    for mask in (described(), described()[:]):
        for call in (eager_attention, compiled):
            assert torch.allclose(call(x, mask)[seen], wanted[seen])
    _, part = torch.compile(parts, backend=backend)(x, described())
    assert torch.equal(part & True, dense()[:, :, 1:])
    assert torch.equal(x[:, :, 1:] + part[..., :4], x[:, :, 1:] + described()[:, :, 1:, :4])


@pytest.mark.parametrize("name", ["_to_dlpack", "_to_dlpack_versioned"])
def test_c_functions_without_an_override_refuse(name: str) -> None:
    convert = getattr(torch._C, name, None) or pytest.skip("not in this version of PyTorch")
    for mask in (described(), described()[:, :, 1:]):
        with pytest.raises(RuntimeError, match="data pointer"):
            convert(mask)
        assert torch.equal(torch.from_dlpack(mask), mask & True)


def test_numbers_are_added_under_scripts_and_transforms() -> None:
    x = models.normal(2, 4, 6, 6)
    wanted = x.masked_fill(~dense(), -torch.inf).softmax(-1)
    assert torch.equal(torch.jit.script(softmax_of_sum)(x, described()).nan_to_num(), softmax_of_sum(x, described()))
    found = torch.vmap(softmax_of_sum)(x, described())
    seen = dense().any(-1).expand(2, 4, 6)
    assert torch.equal(found[seen], wanted[seen])


def logits(model: Any, fed: Any, **options: Any) -> Any:
    out = model.generate(
        **fed, do_sample=False, min_new_tokens=3, max_new_tokens=3, return_dict_in_generate=True, output_logits=True,
        disable_compile=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits)


COMPILED = [
    ("llama", "dynamic", "model"), ("llama", "static", "layers"), ("mistral", "static", "model"),
    ("gemma2", "static", "layers"), ("gemma3", "dynamic", "layers"), ("gpt_oss", "static", "layers"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "cache", "part"), COMPILED)
def test_compiled_models_generate(name: str, cache: str, part: str) -> None:
    fed = models.inputs(name, "left")
    wanted = logits(models.build(name, "eager"), fed)
    model = models.build(name)
    if part == "model":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    found = logits(model, fed, **({"cache_implementation": "static"} if cache == "static" else {}))
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_eager_models_make_no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: VisibleKeys) -> Any:
        raise AssertionError("a dense mask")

    monkeypatch.setattr(VisibleKeys, "dense", make)
    for name in ("llama", "gemma3"):
        for cache in ({}, {"cache_implementation": "static"}):
            logits(models.build(name), models.inputs(name, "left"), **cache)
