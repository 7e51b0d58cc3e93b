"""The example that trains a GPT: its gradients, its checkpoints, and the same training in PyTorch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TINY = ("--layers", "1", "--width", "16", "--heads", "2", "--length", "16", "--batch", "2", "--write", "5")


@pytest.fixture(scope="module")
def example(load_example: Any) -> Any:
    return load_example("train")


@pytest.fixture(scope="module")
def training(load_example: Any) -> Any:
    return load_example("gpt_training")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one.txt").write_text("All work and no play makes attention a dull layer. " * 20, encoding="utf8")
    return folder


def small_model(example: Any) -> tuple[Any, dict[str, Any], Any]:
    config = example.Config(layers=2, width=16, heads=2, kv_heads=2, vocabulary=20, max_length=12)
    weights = {name: x.astype(np.float64) for name, x in example.random_weights(config).items()}
    return config, weights, np.random.default_rng(0).integers(0, 20, (3, 9))


def test_gradients_are_slopes_of_the_loss(example: Any, training: Any) -> None:
    config, weights, tokens = small_model(example)
    _, gradients = training.loss_and_gradients(config, weights, tokens)
    assert gradients.keys() == weights.keys()
    rng, step = np.random.default_rng(1), 1e-5
    for name, weight in weights.items():
        place = tuple(rng.integers(0, n) for n in weight.shape)
        found = []
        for sign in (1, -1):
            changed = weight.copy()
            changed[place] += sign * step
            found.append(training.loss_and_gradients(config, weights | {name: changed}, tokens)[0])
        assert gradients[name][place] == pytest.approx((found[0] - found[1]) / (2 * step), abs=1e-8), name


def test_a_resumed_run_equals_one_without_a_pause(
    example: Any, load_example: Any, texts: Path, tmp_path: Path, capsys: Any
) -> None:
    whole, halves = tmp_path / "whole.npz", tmp_path / "halves.npz"
    common = (str(texts), *TINY, "--picture", str(tmp_path / "loss.png"), "--warm-up", "2")
    assert example.main([*common, "--steps", "6", "--checkpoint", str(whole)]) == 0
    # The schedule depends on the number of steps, so the paused run must be the same run, stopped after 3 steps.
    args = example.parse([*common, "--steps", "6", "--checkpoint", str(halves)])
    stopped(example, load_example("training_run"), args, after=3)
    assert example.main([*common, "--steps", "6", "--checkpoint", str(halves), "--resume"]) == 0
    with np.load(whole) as one, np.load(halves) as other:
        assert one.files == other.files
        assert all(np.array_equal(one[name], other[name]) for name in one.files)
        assert len(one["losses"]) == 6
    assert "step 6 of 6" in capsys.readouterr().err


def stopped(example: Any, running: Any, args: Any, after: int) -> None:
    def stop(step: int, *_: Any) -> None:
        if step == after:
            raise KeyboardInterrupt

    config = example.Config(1, 16, 2, 2, 256, 16)
    run = running.start(example.random_weights(config), example.AdamW(), args, example.DEFINING)
    rates = partial(example.learning_rate, peak=args.rate, warm_up=args.warm_up, steps=args.steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "show_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            running.train(run, example.step_on(example.read_texts(args.texts), config, args), rates, args)
    assert len(run.losses) == after
    run.save(args.checkpoint)


def test_it_learns_and_writes(example: Any, texts: Path, tmp_path: Path, capsys: Any) -> None:
    picture, kept = tmp_path / "loss.png", tmp_path / "kept.npz"
    command = [str(texts), *TINY, "--steps", "60", "--rate", "1e-2", "--warm-up", "5", "--prompt", "All work"]
    assert example.main([*command, "--picture", str(picture), "--checkpoint", str(kept)]) == 0
    assert "\nAll work" in capsys.readouterr().out
    with np.load(kept) as file:
        losses = file["losses"]
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_may_write_more_or_less(example: Any, texts: Path, tmp_path: Path, capsys: Any) -> None:
    kept = tmp_path / "kept.npz"
    common = [str(texts), *TINY, "--picture", str(tmp_path / "loss.png"), "--checkpoint", str(kept), "--prompt", "A"]
    assert example.main([*common, "--steps", "1", "--write", "60"]) == 0
    for count in (0, 20, 70):
        capsys.readouterr()
        assert example.main([*common, "--steps", "1", "--write", str(count), "--resume"]) == 0
        assert len(capsys.readouterr().out.partition("\nA")[2]) == count + 1, "the text and the end of the line"


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_it_writes_with_learned_positions_only(example: Any, load_example: Any, monkeypatch: Any, length: int) -> None:
    config = example.Config(1, 16, 2, 2, 256, length)
    weights, prompt = example.random_weights(config), "attend"
    read: list[int] = []

    class Watched(example.Decoder):
        def __call__(self, tokens: Any, start: int, caches: Any) -> Any:
            read.append(start + tokens.shape[1])
            return super().__call__(tokens, start, caches)

    monkeypatch.setattr(example, "Decoder", Watched)
    text = example.write(config, weights, prompt, 40, seed=3)
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + 40
    assert max(read) == length
    if length == 16:
        parts = load_example("generate")
        chooser = example.Chooser(0.8, 3, np.array([10, *range(32, 127)]))
        plain = parts.generate_again(parts.Decoder(config, weights), example.encode(prompt), 11, chooser)
        assert text[6:17] == "".join(map(chr, plain)), "until the positions are used up"


def test_what_it_cannot_do_it_says(example: Any, texts: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert example.main([str(tmp_path / "empty"), *TINY]) == 1
    assert "too few" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example.main([str(texts), "--resume"])
    assert "--resume needs an existing --checkpoint" in capsys.readouterr().err


def torch_loss(torch: Any, config: Any, weights: dict[str, Any], tokens: Any) -> Any:
    functional = torch.nn.functional
    ids, targets = tokens[:, :-1], tokens[:, 1:]

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.epsilon
        )

    def linear(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][ids] + weights["wpe.weight"][: ids.shape[1]]
    for i in range(config.layers):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").unflatten(-1, (3, config.heads, -1))
        heads = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + linear(heads.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        inner = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + linear(functional.gelu(inner, approximate="tanh"), f"h.{i}.mlp.c_proj")
    logits = norm(x, "ln_f") @ weights["wte.weight"].T
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-3)])
def test_the_same_training_in_pytorch(
    example: Any, training: Any, load_example: Any, dtype: str, tolerance: float
) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    parts = load_example("training")
    config, weights, _ = small_model(example)
    weights = {name: x.astype(dtype) for name, x in weights.items()}
    leaves = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in weights.items()}
    groups = [{"params": [x for x in leaves.values() if x.ndim > 1], "weight_decay": 0.1}]
    groups.append({"params": [x for x in leaves.values() if x.ndim < 2], "weight_decay": 0.0})
    optimiser, own = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8), parts.AdamW()
    rng = np.random.default_rng(2)
    for step in range(200):
        tokens = rng.integers(0, 20, (3, 9))
        loss, gradients = training.loss_and_gradients(config, weights, tokens)
        own.update(weights, gradients, 3e-3)
        optimiser.zero_grad()
        other = torch_loss(torch, config, leaves, torch.from_numpy(tokens))
        other.backward()
        optimiser.step()
        assert loss == pytest.approx(other.item(), abs=tolerance), step
