"""The Transformer-XL example: segments against one pass, and against transformers' XLNet, which has its attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def example(load_example: Any) -> Any:
    return load_example("transformer_xl")


@pytest.fixture(scope="module")
def ids() -> Any:
    return np.random.default_rng(3).integers(0, 256, (2, 150))


@pytest.mark.parametrize(("segment", "memory"), [(32, 0), (32, 20), (32, 64), (50, 1000), (1, 9), (150, 10)])
@pytest.mark.parametrize("clamp", [None, 12])
def test_segments_are_one_pass(example: Any, ids: Any, segment: int, memory: int, clamp: int | None) -> None:
    config = example.Config(layers=3, width=32, heads=4, inner=64, clamp_length=clamp)
    model = example.TransformerXL(config, example.random_weights(config))
    parts = np.concatenate(list(model.segments(ids, segment, memory)), axis=1)
    whole, _ = model(ids, mask=example.seen_in_segments(150, segment, memory))
    assert np.allclose(parts, whole, rtol=0, atol=2e-5)
    unlike, _ = model(ids)  # everything before: the memory matters
    assert memory >= 150 or segment == 150 or not np.allclose(parts, unlike, rtol=0, atol=1e-3)


@pytest.mark.parametrize("attention", ["uni", "bi"])
@pytest.mark.parametrize("clamp", [None, 9])
def test_against_xlnet(example: Any, ids: Any, attention: str, clamp: int | None) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 256, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64, "initializer_range": 0.2}
    kinds = {"attn_type": attention, "clamp_len": clamp or -1, "mem_len": 40, "use_mems_eval": True}
    torch.manual_seed(0)
    model = transformers.XLNetModel(transformers.XLNetConfig(**sizes, **kinds)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # biases are zeros otherwise
            if name.endswith("bias"):
                weight.normal_(0, 0.2)
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    own = example.TransformerXL(example.Config(3, 32, 4, 64, clamp_length=clamp), weights)
    causal = attention == "uni"
    theirs, mine = None, None
    for start in range(0, 150, 50):
        part = ids[:, start : start + 50]
        with torch.no_grad():
            found = model(torch.from_numpy(part), mems=theirs)
        theirs = found.mems
        x, states = own(part, mine, causal=causal)
        before = states if mine is None else [np.concatenate(pair, axis=1) for pair in zip(mine, states, strict=True)]
        mine = [state[:, -40:] for state in before]
        assert np.allclose(x, found.last_hidden_state.numpy(), rtol=0, atol=1e-4)


def test_the_program_checks_itself(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 3)
    assert example.main([str(text), "--segment", "64", "--memory", "100", "--tokens", "600"]) == 0
    printed = capsys.readouterr().out
    assert "600 tokens in 10 segments" in printed
    assert float(printed.split("states: ")[1]) < example.TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--segment", "0"], "segment and tokens must be at least 1"),
        (["--memory", "-1"], "memory at least 0"),
        (["absent"], "absent: No such file"),
    ],
)
def test_errors(example: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err
