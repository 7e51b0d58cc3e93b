"""What selfattn refuses inside a model of transformers, and how the name reaches the model."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

import transformers_models as models  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers_models import layer, normal  # noqa: E402

from selfattn.integrations._hf_attention import attention_forward  # noqa: E402
from selfattn.integrations._hf_mask import make_mask  # noqa: E402
from selfattn.integrations.transformers import register  # noqa: E402


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    register()
    with torch.no_grad():
        yield


# Versions of transformers before 5.24 use torch.jit.script, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
X = (1, 2, 5, 8)
REFUSED = {
    "unknown": (TypeError, "unexpected keyword argument 'places'", {"places": torch.zeros(1)}),
    "blocks": (TypeError, "block_indices is given, but Module has no indexer", {"block_indices": torch.zeros(1)}),
    "paged": (TypeError, "unexpected keyword argument 'cache'", {"cache": SimpleNamespace()}),
    "blocks of three axes": (
        ValueError, r"block_indices has shape \(1, 5, 2\), but \(1, any, 5, any\) is needed",
        {"module": layer(indexer=SimpleNamespace(block_size=4)), "block_indices": torch.zeros(1, 5, 2)},
    ),
    "blocks beyond": (
        ValueError, "block_indices has 2, but there are 2 blocks",
        {"module": layer(indexer=SimpleNamespace(block_size=4)), "block_indices": torch.full((1, 1, 5, 1), 2)},
    ),
    "blocks that are none": (
        TypeError, "block_indices has dtype torch.float32",
        {"module": layer(indexer=SimpleNamespace(block_size=4)), "block_indices": torch.zeros(1, 1, 5, 1)},
    ),
    "indices of others": (
        ValueError, r"indices has shape \(1, 4, 2\), but \(1, 5, any\) is needed", {"indices": torch.zeros(1, 4, 2)},
    ),
    "indices beyond": (ValueError, "indices has 5, but there are 5 keys", {"indices": torch.full((1, 5, 1), 5)}),
    "indices that are none": (TypeError, "indices has dtype torch.float32", {"indices": torch.zeros(1, 5, 2)}),
    "indices elsewhere": (
        ValueError, "indices is on device meta", {"indices": torch.zeros((1, 5, 2), device="meta")},
    ),
    "sinks of others": (
        ValueError, r"sinks has shape \(1, 2, 5, 2\), but \(1, 2, 5, 1\) is needed", {"sinks": torch.zeros(1, 2, 5, 2)},
    ),
    "sinks twice": (TypeError, "sinks and s_aux are two names", {"sinks": torch.zeros(2), "s_aux": torch.zeros(2)}),
    "packed to another end": (ValueError, r"cu_seq_lens_q is \[0, 2, 4\]", {"cu_seq_lens_q": torch.tensor([0, 2, 4])}),
    "packed by numbers": (TypeError, "cu_seq_lens_. has shape", {"cu_seq_lens_k": torch.tensor([0.0, 5.0])}),
    "packed differently": (
        ValueError, "cu_seq_lens_q packs 2 sequences, but cu_seq_lens_k 1",
        {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 5])},
    ),
    "packed and chosen": (
        ValueError, "cu_seq_lens_q packs sequences, but attention_mask or indices hide",
        {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "indices": torch.zeros((1, 5, 1), dtype=torch.long)},
    ),
    "packed batch": (
        ValueError, "cu_seq_lens_q is given for 2 batch entries",
        {name: torch.zeros(2, 2, 5, 8) for name in ("query", "key", "value")} | {"cu_seq_lens_q": torch.tensor([0, 5])},
    ),
    "two-sided window": (ValueError, "sliding_window is 3 for 5 keys", {"is_causal": False, "sliding_window": 3}),
    "integers": (TypeError, "attention_mask has dtype torch.int64", {"attention_mask": torch.ones((5, 5)).long()}),
    "mask elsewhere": (
        ValueError, "attention_mask is on device meta",
        {"attention_mask": torch.ones((5, 5), dtype=torch.bool, device="meta")},
    ),
    "key elsewhere": (ValueError, "key is on device meta", {"key": torch.zeros(X, device="meta")}),
    "value elsewhere": (ValueError, "value is on device meta", {"value": torch.zeros(X, device="meta")}),
    "query elsewhere": (ValueError, "query is on device meta", {"query": torch.zeros(X, device="meta")}),
    "three axes": (ValueError, r"query has shape \(2, 5, 8\)", {"query": torch.zeros(2, 5, 8)}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    kind, message, changes = REFUSED[case]
    call = {"module": layer(), "query": normal(*X), "key": normal(*X), "value": normal(*X), "attention_mask": None}
    attention_forward(**call, position_ids=torch.zeros(5), cu_seq_lens_q=None, use_cache=True)
    with pytest.raises(kind, match=f"selfattn: {message}"):
        attention_forward(**{**call, **changes})


def test_accepts_a_two_sided_window_that_hides_nothing() -> None:
    call = {"query": normal(*X), "key": normal(*X), "value": normal(*X), "attention_mask": None, "is_causal": False}
    wide, _ = attention_forward(layer(), **call, sliding_window=4)
    assert torch.equal(wide, attention_forward(layer(), **call)[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")  # by versions of PyTorch after 2.5
def test_refuses_tracing() -> None:
    query = normal(*X)
    with pytest.raises(RuntimeError, match="traced"):
        torch.jit.trace(lambda x: attention_forward(layer(), x, x, x, None)[0], (query,))


OWN = {
    "mpt": lambda: hf.MptConfig(vocab_size=99, d_model=32, n_layers=1, n_heads=4),
    # These never ask for a mask, or look the name up in their own table.
    "deberta_v2": lambda: hf.DebertaV2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    ),
    "xlnet": lambda: hf.XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=48),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]
    ),
    # Its vision part gets its attention function from transformers; its text part, in another module, does not.
    "blip_text": lambda: hf.BlipTextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
}


@pytest.mark.parametrize("name", OWN)
def test_refuses_models_with_their_own_attention(name: str) -> None:
    kind = hf.BlipTextModel if name == "blip_text" else hf.AutoModel.from_config

    def build(attention: str) -> Any:
        config = OWN[name]()
        config._attn_implementation = attention
        return kind(config)

    message = rf"has its own attention code \(transformers\.models\.\w+\.modeling_{name}\)"
    with pytest.raises(ValueError, match=message):
        build("selfattn")
    model = build("eager")
    model.set_attn_implementation("selfattn")  # transformers itself warns, and changes nothing
    assert model.config._attn_implementation == "eager"


def test_refuses_models_that_look_names_up_in_their_own_tables() -> None:
    with pytest.raises(ValueError, match=r"GitModel has its own attention code \(transformers\.models\.git\.model"):
        hf.GitModel(hf.GitConfig(num_hidden_layers=1, attn_implementation="selfattn"))


def test_looks_at_the_base_classes_of_foreign_models() -> None:
    class Mine(hf.DebertaV2Model):
        pass

    class AttentionPooling(hf.BertModel):  # the name says nothing about BERT's attention
        pass

    with pytest.raises(ValueError, match="Mine has its own attention code"):
        Mine(hf.DebertaV2Config(num_hidden_layers=1, attn_implementation="selfattn"))
    AttentionPooling(hf.BertConfig(num_hidden_layers=1, attn_implementation="selfattn"))


def test_registering_again_changes_nothing() -> None:
    from transformers.models.bloom.modeling_bloom import BloomAttention
    from transformers.models.falcon.modeling_falcon import FALCON_ATTENTION_CLASSES

    def state() -> tuple[Any, ...]:
        return (
            AttentionInterface()["selfattn"], AttentionMaskInterface()["selfattn"], BloomAttention.forward,
            dict(FALCON_ATTENTION_CLASSES), hf.PreTrainedModel.get_correct_attn_implementation,
        )  # fmt: skip

    before = state()
    register()
    assert state() == before
    assert before[:2] == (attention_forward, make_mask)


def test_unregistered_names_raise() -> None:
    with pytest.raises(ValueError, match="selfattn_not_registered"):
        models.build("llama", "selfattn_not_registered")
