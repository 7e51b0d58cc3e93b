"""Models of transformers train with selfattn as with their own eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

import transformers_models as models  # noqa: E402
from transformers_models import layer, normal  # noqa: E402

from selfattn.integrations import _torch_call  # noqa: E402
from selfattn.integrations._hf_attention import attention_forward  # noqa: E402
from selfattn.integrations._hf_mask import VisibleKeys, make_mask  # noqa: E402
from selfattn.integrations.transformers import register  # noqa: E402

# Versions of transformers differ in what they deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:.*use_reentrant", "ignore:.*pin_memory")

# Models whose attention has dropout by default. Losses with it cannot be compared.
WITHOUT_DROPOUT: dict[str, dict[str, Any]] = {
    "bart": {"dropout": 0.0},
    "bert": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
}
TRAINED = ("llama", "mistral", "gemma2", "gpt_oss", "bert", "t5", "bloom", "falcon", "bart", "deepseek_v4")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str, implementation: str = "selfattn") -> Any:
    model = models.build(name, implementation, **WITHOUT_DROPOUT.get(name, {}))
    return model.train()


def loss(model: Any, fed: dict[str, Any]) -> Any:
    """Return a number to which every real token contributes."""
    output = model(**fed)
    states = output.logits if hasattr(output, "logits") else output.last_hidden_state
    mask = fed.get("attention_mask")
    if mask is not None and mask.shape[1] == states.shape[1]:
        states = states[mask.bool()]
    return states.sin().mean()


def gradients(model: Any, fed: dict[str, Any]) -> dict[str, Any]:
    model.zero_grad()
    loss(model, fed).backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    top = max(float(x.abs().max()) for x in expected.values())
    for name, x in expected.items():
        assert float((found[name] - x).abs().max()) <= 1e-5 * max(float(x.abs().max()), 1e-1 * top), name


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_eager_attention(name: str) -> None:
    model, other = build(name), build(name, "eager")
    for padding in models.paddings(name):
        fed = models.inputs(name, padding)
        assert_close(gradients(model, fed), gradients(other, fed))
    learned = {"gpt_oss": "sinks", "t5": "relative_attention_bias", "deepseek_v4": "sinks"}.get(name)
    if learned:
        assert any(learned in key and float(x.grad.abs().max()) > 0 for key, x in model.named_parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "t5"])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    model, fed = build(name), models.inputs(name, "left")
    expected = gradients(model, fed)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_close(gradients(model, fed), expected)


def test_masks_stay_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pass makes an array with all pairs of queries and keys."""
    seen: list[dict[str, Any]] = []
    backward = _torch_call.attention_backward

    def spy(*arrays: Any, **options: Any) -> Any:
        seen.append(options)
        return backward(*arrays, **options)

    monkeypatch.setattr(_torch_call, "attention_backward", spy)
    monkeypatch.setattr(VisibleKeys, "dense", None)
    for use_reentrant in (None, False, True):
        for padding, expected in (("none", set()), ("left", {"kv_starts"}), ("right", {"kv_lens", "q_offset"})):
            model = build("mistral")
            if use_reentrant is not None:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            seen.clear()
            gradients(model, models.inputs("mistral", padding))
            assert len(seen) == 2
            for options in seen:
                assert (options["causal"], options["window"]) == (True, (6, None))
                assert expected <= options.keys()
                assert "mask" not in options


def test_operands_are_read_in_place_and_results_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (normal(2, 5, 2, 8, seed=i).transpose(1, 2).requires_grad_() for i in range(3))
    seen: list[Any] = []
    backward = _torch_call.attention_backward
    monkeypatch.setattr(_torch_call, "attention_backward", lambda *a, **o: (seen.extend(a[1:4]), backward(*a, **o))[1])
    out, _ = attention_forward(layer(), q, k, v, make_mask(2, 5, 5))
    assert out.is_contiguous()
    out.sum().backward()
    assert [x.ctypes.data for x in seen] == [x.data_ptr() for x in (q, k, v)]
    assert all(x.grad is not None for x in (q, k, v))


def eager(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> tuple[Any, Any]:
    sinks = sinks if sinks.ndim == 4 else sinks[:, None, None].expand(2, 2, 5, 1)
    scores = torch.cat([q @ k.mT * 0.3 + bias, sinks], dim=-1)
    weights = scores.softmax(-1)[..., :-1]
    return (weights @ v).transpose(1, 2), weights


@pytest.mark.parametrize("sinks", [(2,), (2, 2, 5, 1)], ids=str)
def test_arguments_and_weights_are_differentiable(sinks: tuple[int, ...]) -> None:
    shapes = [(2, 2, 5, 8)] * 3 + [(1, 2, 5, 5), (2, 1, 5, 5), sinks]
    tensors = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    q, k, v, position_bias, mask, sink = tensors
    found = attention_forward(
        layer(), q, k, v, mask, scaling=0.3, position_bias=position_bias, sinks=sink, output_attentions=True
    )
    expected = eager(q, k, v, mask + position_bias, sink)
    upstream = [normal(*x.shape, seed=9) for x in expected]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
    slopes = torch.autograd.grad(found, tensors, upstream)
    for x, y in zip(slopes, torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_autocast() -> None:
    model, fed = build("llama"), models.inputs("llama", "left")
    expected = gradients(model, fed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model, fed)
    for name, x in expected.items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - x).norm() / x.norm()) < 0.1, name


def curve(implementation: str) -> list[float]:
    model, fed = build("llama", implementation), models.inputs("llama", "right")
    labels = fed["input_ids"].masked_fill(fed["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        step = model(**fed, labels=labels).loss
        step.backward()
        optimizer.step()
        losses.append(step.item())
    return losses


def test_losses_fall_as_with_eager_attention() -> None:
    found = curve("selfattn")
    assert found[-1] < 0.6 * found[0]
    assert found == pytest.approx(curve("eager"), rel=1e-3)


def test_trainer(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    fed = models.inputs("llama", "left")
    examples = [{name: x[i] for name, x in fed.items()} | {"labels": fed["input_ids"][i]} for i in (0, 1)] * 4
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        gradient_checkpointing=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = hf.Trainer(model=build("llama"), args=arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_dropout_is_repeated_by_checkpointing(name: str, use_reentrant: bool) -> None:
    model, fed = models.build(name).train(), models.inputs(name, "left")
    torch.manual_seed(3)
    expected = gradients(model, fed)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    assert_close(gradients(model, fed), expected)
