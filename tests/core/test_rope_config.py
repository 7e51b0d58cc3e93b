"""RoPE.from_config: each rope_type by its formula in float64, old and new keys, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import selfattn as sa

pytestmark = pytest.mark.one_isa

BASE, DIM = 500000.0, 64
RATES = BASE ** -(np.arange(0, DIM, 2) / DIM)
LENGTHS = {"max_position_embeddings": 65536}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 99 for i in range(32)], "long_factor": [9.0] * 32}


def config(parameters: dict[str, Any], **others: Any) -> dict[str, Any]:
    """Eight heads of 64 elements."""
    whole = {"hidden_size": 512, "num_attention_heads": 8, **LENGTHS, **others}
    return {**whole, "rope_parameters": {"rope_theta": BASE, **parameters}}


def yarn(factor: float, length: int, fast: float = 32, slow: float = 1, whole: bool = True) -> Any:
    """Peng et al., "YaRN", 2023, equations 17 to 23: by the number of turns of a pair in the trained length."""
    ends = [DIM * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(BASE)) for turns in (fast, slow)]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if whole else ends
    kept = 1 - np.clip((np.arange(DIM // 2) - low) / (high - low), 0, 1)
    return RATES * (kept + (1 - kept) / factor)


def llama(factor: float, low: float, high: float, length: int) -> Any:
    found = []
    for rate in RATES:
        turns = length * rate / (2 * math.pi)
        smooth = (turns - low) / (high - low)
        part = rate * (1 - smooth) / factor + rate * smooth
        found.append(rate if turns > high else rate / factor if turns < low else part)
    return found


def longer(factor: float, length: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(length))


# Parameters, arguments, frequencies and the factor of cosines and sines.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any, float]] = {
    "default": ({}, {}, RATES, 1.0),
    "linear": ({"rope_type": "linear", "factor": 4.0}, {}, RATES / 4, 1.0),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, {}, RATES, 1.0),
    "dynamic, short": ({"rope_type": "dynamic", "factor": 4.0}, {"seq_len": 100}, RATES, 1.0),
    "dynamic, long": (
        {"rope_type": "dynamic", "factor": 4.0},
        {"seq_len": 131072},
        (BASE * 5 ** (64 / 62)) ** -(np.arange(0, DIM, 2) / DIM),
        1.0,
    ),
    "yarn": (YARN, {}, yarn(16, 4096), 0.1 * math.log(16) + 1),
    "yarn, factor by lengths": ({**YARN, "factor": None}, {}, yarn(16, 4096), 0.1 * math.log(16) + 1),
    "yarn, attention_factor": ({**YARN, "attention_factor": 0.7}, {}, yarn(16, 4096), 0.7),
    "yarn, betas": (
        {**YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False},
        {},
        yarn(16, 4096, 16, 2, False),
        0.1 * math.log(16) + 1,
    ),
    "yarn, mscale": (
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        {},
        yarn(16, 4096),
        (0.1 * math.log(16) + 1) / (0.07 * math.log(16) + 1),
    ),
    "llama3": ({**LLAMA, "original_max_position_embeddings": 8192}, {}, llama(8, 1, 4, 8192), 1.0),
    "longrope": (
        {**LONG, "original_max_position_embeddings": 4096},
        {},
        RATES / LONG["short_factor"],
        longer(16, 4096),
    ),
    "longrope, long": ({**LONG, "factor": 2.0}, {"seq_len": 65537}, RATES / 9, longer(2, 65536)),
    "longrope, attention_factor": (
        {**LONG, "original_max_position_embeddings": 4096, "attention_factor": 1.5},
        {"seq_len": 4096},
        RATES / LONG["short_factor"],
        1.5,
    ),
    "proportional": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
        {},
        np.where(np.arange(32) < 8, RATES / 2, 0),
        1.0,
    ),
    "axial": (
        {"rope_type": "axial"},
        {},
        np.tile(BASE ** -(np.arange(0, 32, 2) / 32), 2),
        1.0,
    ),
    "a part": ({"partial_rotary_factor": 0.5}, {}, BASE ** -(np.arange(0, 32, 2) / 32), 1.0),
    "an odd part": ({"partial_rotary_factor": 0.49}, {}, BASE ** -(np.arange(0, 31, 2) / 31), 1.0),
    "head_dim": ({}, {"head_dim": 16}, BASE ** -(np.arange(0, 16, 2) / 16), 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_formulas(name: str) -> None:
    parameters, arguments, frequencies, scaling = CASES[name]
    rope = sa.RoPE.from_config(config(parameters), **arguments)
    assert rope.rotary_dim == 2 * len(frequencies)
    assert np.allclose(rope.inv_freq, frequencies, rtol=1e-14, atol=0)
    assert np.isclose(rope.attention_scaling, scaling, rtol=1e-15)
    assert not rope.interleaved
    old = config({})
    del old["rope_parameters"]
    renamed = {"type" if key == "rope_type" else key: value for key, value in parameters.items()}
    assert sa.RoPE.from_config({**old, "rope_theta": BASE, "rope_scaling": renamed}, **arguments) == rope


def test_default_has_the_bits_of_a_base(normal: Any) -> None:
    x = normal(2, 30, 64, dtype=np.float64)
    found = sa.apply_rope(x, rope=sa.RoPE.from_config(config({})))
    assert np.array_equal(found, sa.apply_rope(x, rope=sa.RoPE(BASE)))


SAME: dict[str, tuple[dict[str, Any], sa.RoPE]] = {
    "Llama 2": ({"hidden_size": 64, "num_attention_heads": 8}, sa.RoPE(1e4, 8)),
    "GPT-J": ({"n_embd": 64, "n_head": 4, "rotary_dim": 6}, sa.RoPE(1e4, 6)),
    "GPT-NeoX": (
        {"hidden_size": 64, "num_attention_heads": 4, "rotary_pct": 0.25, "rotary_emb_base": 500.0},
        sa.RoPE(500.0, 4),
    ),
    "Phi": (
        {"hidden_size": 64, "num_attention_heads": 4, "partial_rotary_factor": 0.5, "rope_theta": 300},
        sa.RoPE(300, 8),
    ),
    "DeepSeek": (
        {"hidden_size": 64, "num_attention_heads": 4, "qk_rope_head_dim": 8, "rope_interleave": True},
        sa.RoPE(1e4, 8, True),
    ),
    "vision": ({"embed_dim": 64, "hidden_size": 999, "num_heads": 8}, sa.RoPE(1e4, 8)),
    "new over old": ({"head_dim": 8, "rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}, sa.RoPE(7.0, 8)),
}


@pytest.mark.parametrize("name", SAME)
def test_keys_of_models(normal: Any, name: str) -> None:
    given, plain = SAME[name]
    x = normal(5, 16)
    assert np.array_equal(sa.apply_rope(x, rope=sa.RoPE.from_config(given)), sa.apply_rope(x, rope=plain))


def test_pairs() -> None:
    given = {"head_dim": 8, "rope_interleave": True}
    found = [sa.RoPE.from_config(given, interleaved=x).interleaved for x in (None, False, True)]
    assert found == [True, False, True]


def test_types_of_layers() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {"head_dim": 8, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": linear}
    full, sliding = {"rope_theta": 1e6, **linear}, {"rope_type": "default", "rope_theta": 1e4}
    new = {"head_dim": 8, "rope_parameters": {"full_attention": full, "sliding_attention": sliding, "none": None}}
    rates = 1e6 ** -(np.arange(4) / 4), 1e4 ** -(np.arange(4) / 4)
    for given in (old, new):
        ropes = [sa.RoPE.from_config(given, layer_type=x) for x in ("full_attention", "sliding_attention")]
        assert np.allclose(ropes[0].inv_freq, rates[0] / 8, rtol=1e-15)
        assert np.allclose(ropes[1].inv_freq, rates[1], rtol=1e-15)
        for wrong in (None, "sliding"):
            with pytest.raises(ValueError, match=f"layer_type is {wrong!r}, but it must be one of 'full_attention'"):
                sa.RoPE.from_config(given, layer_type=wrong)
    with pytest.raises(ValueError, match="layer_type is 'none', which has no rotary embedding"):
        sa.RoPE.from_config(new, layer_type="none")
    both = {"head_dim": 8, "global_rope_theta": 160000.0, "local_rope_theta": 1e4}  # ModernBERT
    ropes = [sa.RoPE.from_config(both, layer_type=x) for x in ("full_attention", "sliding_attention")]
    assert np.allclose([rope.inv_freq for rope in ropes], [160000.0 ** -(np.arange(4) / 4), rates[1]], rtol=1e-15)
    one = {"head_dim": 8, "layer_types": ["full_attention", "linear_attention"]}
    assert sa.RoPE.from_config(one, layer_type="linear_attention") == sa.RoPE.from_config(one)
    with pytest.raises(ValueError, match="layer_type is 'sliding_attention', but it must be one of 'full_attention'"):
        sa.RoPE.from_config(one, layer_type="sliding_attention")


def test_sections() -> None:
    def axes(**parameters: Any) -> Any:
        return sa.RoPE.from_config({"head_dim": 20, "rope_scaling": parameters}).axes

    assert axes(type="mrope", mrope_section=[4, 3, 3]) == (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert axes(mrope_section=[4, 3, 3], mrope_interleaved=True) == (0, 1, 2, 0, 1, 2, 0, 1, 2, 0)
    assert axes(mrope_section=[6, 2, 2], mrope_interleaved=True) == (0, 1, 2, 0, 1, 2, 0, 0, 0, 0)
    assert axes(rope_type="axial") == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)
    assert axes() is None


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "config is a list, but a dict is needed": ([], {}),
    "rope_parameters is 3, but a dict": ({"head_dim": 8, "rope_parameters": 3}, {}),
    "rope_type is 'ntk', but it must be one of 'default', 'linear', ": (config({"rope_type": "ntk"}), {}),
    "rope_type is 3, but": (config({"rope_type": 3}), {}),
    "alpha is not a key of rope_type 'dynamic', which has rope_type, ": (
        config({"rope_type": "dynamic", "factor": 1.0, "alpha": 2.0}),
        {},
    ),
    "factor is not a key of rope_type 'default'": (config({"factor": 1.0}), {}),
    "factor is missing, which rope_type 'linear' needs": (config({"rope_type": "linear"}), {}),
    "factor is missing, which rope_type 'yarn' needs": (config({"rope_type": "yarn"}), {}),
    "factor is 'x', but a real number": (config({"rope_type": "linear", "factor": "x"}), {}),
    "factor is 0, but it must be greater than 0": (config({"rope_type": "linear", "factor": 0}), {}),
    "low_freq_factor is missing": (config({"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}), {}),
    "high_freq_factor is 1.0, but it must be greater than low_freq_factor, 1.0": (
        config({**LLAMA, "high_freq_factor": 1.0}),
        {},
    ),
    "short_factor is missing, which rope_type 'longrope' needs": (
        config({"rope_type": "longrope", "long_factor": [1.0]}),
        {},
    ),
    "long_factor is .1.0., but a list of 32 numbers": (config({**LONG, "long_factor": [1.0]}), {"seq_len": 99999}),
    "short_factor is 2, but a list of 32": (config({**LONG, "short_factor": 2}), {}),
    "truncate is 1, but": (config({**YARN, "truncate": 1}), {}),
    "rope_theta is 1.0, but it must be greater than 1": (config({"rope_theta": 1.0}), {}),
    "partial_rotary_factor is 1.5, which rotates 96.0 of 64": (config({"partial_rotary_factor": 1.5}), {}),
    "rotary_dim is 100": ({"head_dim": 64, "rotary_dim": 100}, {}),
    "hidden_size is missing": ({"num_attention_heads": 8}, {}),
    "num_attention_heads is missing": ({"hidden_size": 8}, {}),
    "max_position_embeddings is missing": ({"head_dim": 8, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}),
    "head_dim is needed, because this model has layers": ({"head_dim": 8, "global_head_dim": 16}, {}),
    "head_dim is 1, but it must be in 2": (config({}), {"head_dim": 1}),
    "seq_len is 0": (config({}), {"seq_len": 0}),
    "layer_type is 3, but a str": (config({}), {"layer_type": 3}),
    "interleaved is 1": (config({}), {"interleaved": 1}),
    "mrope_section is .16, 8., but a list of integers with sum 32": (config({"mrope_section": [16, 8]}), {}),
    "mrope_section is arranged in another way by ernie4_5_vl_moe_text: pass axes": (
        config({"mrope_section": [12, 10, 10]}, model_type="ernie4_5_vl_moe_text"),
        {},
    ),
    "rope_type is 'dynamic', but only 2 elements": (config({"rope_type": "dynamic", "factor": 2.0}), {"head_dim": 2}),
    "rope_type is 'axial', but 6 elements": (config({"rope_type": "axial"}), {"head_dim": 6}),
    "unexpected keyword argument 'layer_typ'": (config({}), {"layer_typ": "x"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    given, arguments = REFUSED[message]
    with pytest.raises((TypeError, ValueError), match=r"^RoPE(\.from_config)?: " + message):
        sa.RoPE.from_config(given, **arguments)
