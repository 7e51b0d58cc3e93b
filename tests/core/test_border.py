"""The border to the core: options have names, each of one type; words have codes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from inspect import getsource, signature, unwrap
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa
from selfattn import _cascade, _core, _elements, _linear, _typing
from selfattn._arguments import core_options
from selfattn._attention import ONLY_HERE

pytestmark = pytest.mark.one_isa

STUB = Path(sa.__file__).with_name("_core.pyi")

FIELDS: dict[str, Any] = {
    "mask": np.ones(3, bool),
    "bias": np.ones(3),
    "q_offset": np.array(1),
    "q_lens": np.array(1),
    "kv_lens": np.array(1),
    "kv_starts": np.array(1),
    "prefix_lens": np.array(1),
    "alibi_slopes": np.ones(3),
    "sinks": np.ones(3),
    "distance_bias": np.ones((3, 4)),
    "layout": 1,
    "causal": True,
    "window_left": 1 << 60,
    "window_right": 0,
    "chunk": 5,
    "scale": 0.5,
    "softcap": 2.0,
    "precision": 2,
    "distance_origin": 3,
    "dropout": 0.25,
    "seed": (1 << 64) - 1,
    "first_entry": 1,
    "first_head": 2,
    "first_query": 3,
    "first_key": 4,
    "return_lse": True,
    "return_weights": True,
    "return_key_mass": True,
    "exact": True,
    "same_tokens": True,
    "num_threads": 4096,
}


def fields_of(options: _core.Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in dir(options) if name[0] != "_" and name != "copy"}


def filled() -> _core.Options:
    options = _core.Options()
    for name, value in FIELDS.items():
        setattr(options, name, value)
    return options


def test_fields_keep_what_they_are_given() -> None:
    assert fields_of(filled()) == FIELDS
    for name, value in fields_of(_core.Options()).items():
        options = filled()
        setattr(options, name, value)
        assert fields_of(options) == {**FIELDS, name: value}


def test_stub_names_every_field() -> None:
    stub = ast.parse(STUB.read_text(encoding="utf8"))
    (fields,) = (x for x in stub.body if isinstance(x, ast.ClassDef) and x.name == "Options")
    named = [x.target.id for x in fields.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]
    assert named == list(FIELDS)
    assert sorted(named) == sorted(fields_of(_core.Options()))


def test_the_core_names_its_options() -> None:
    assert sorted(_core.OPTIONS) == sorted(FIELDS)
    assert set(_core.ARRAY_OPTIONS) == {name for name, value in FIELDS.items() if isinstance(value, np.ndarray)}


def test_only_options_that_a_cascade_supports_allow_one() -> None:
    assert _cascade.suits_cascade(_core.Options())
    for name, value in FIELDS.items():
        options = _core.Options()
        setattr(options, name, value)
        assert _cascade.suits_cascade(options) is (name in _cascade._WITH_CASCADE)
    assert set(FIELDS) > _cascade._WITH_CASCADE


def test_a_call_passes_options_in_the_order_of_its_signature() -> None:
    taken = list(signature(core_options).parameters.values())[1:]
    own = ("out", *ONLY_HERE)
    offered = [x for x in signature(sa.attention).parameters.values() if x.kind is x.KEYWORD_ONLY and x.name not in own]
    assert [(x.name, x.default) for x in taken] == [(x.name, x.default) for x in offered]


@pytest.mark.parametrize("function", [sa.attention, sa.attention_with_kvcache])
def test_options_that_are_passed_by_position_are_in_their_places(function: Callable[..., Any]) -> None:
    names = list(signature(core_options).parameters)[1:]
    offered = signature(function).parameters
    calls = [x for x in ast.walk(ast.parse(dedent(getsource(unwrap(function))))) if isinstance(x, ast.Call)]
    (call,) = (x for x in calls if isinstance(x.func, ast.Name) and x.func.id == "core_options")
    assert [ast.unparse(x) for x in call.args[1:]] == [name if name in offered else "None" for name in names]
    assert not call.keywords


def operand_types() -> list[ast.ClassDef]:
    classes = [x for x in ast.parse(STUB.read_text(encoding="utf8")).body if isinstance(x, ast.ClassDef)]
    return [x for x in classes if x.name != "Options"]


@pytest.mark.parametrize("stub", operand_types(), ids=lambda stub: stub.name)
def test_operands_have_the_fields_of_the_stub(stub: ast.ClassDef) -> None:
    (init,) = (x for x in stub.body if isinstance(x, ast.FunctionDef) and x.name == "__init__")
    fields = [x.target.id for x in stub.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]
    assert [x.arg for x in init.args.kwonlyargs] == fields
    kind = getattr(_core, stub.name)
    values = {name: getattr(kind(), name) for name in fields}
    assert sorted(values) == sorted(name for name in dir(kind) if name[0] != "_" and name != "copy")
    for name, value in values.items():
        new = np.ones(3) if value is None else type(value)(1)
        assert getattr(kind(**{name: new}), name) is new or type(new) is float
        made = kind()
        setattr(made, name, new)
        assert getattr(made, name) == pytest.approx(new)
        with pytest.raises(TypeError, match="has no argument 'other'"):
            kind(**{name: new, "other": new})
    with pytest.raises(TypeError, match="takes keyword arguments only"):
        kind(1)


def test_calls_refuse_other_operands() -> None:
    x, options = np.zeros((1, 1, 1, 1), np.float32), _core.Options()
    for other in ((x, x, x), None, options):
        with pytest.raises(TypeError, match="VarlenInputs is needed"):
            _core.attention_varlen("f", other, None, options)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="GradientInputs is needed"):
            _core.attention_backward("f", (x, x, x), other, ("q",), options)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="RelativeInputs is needed"):
            _core.relative_attention("f", (x, x, x), other, None, options)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="UnpackedWeights is needed"):
            _core.make_layer(other, _core.LayerNorms(), 1, 1, None)  # type: ignore[arg-type,call-arg]
        with pytest.raises(TypeError, match="UnpackedLinear is needed"):
            _core.make_linear(other, _core.ACTIVATIONS["none"], _core.PRECISIONS["highest"])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="FeedForwardWeights is needed"):
            _core.call_feed_forward(other, "f", x, None, None, 1)  # type: ignore[arg-type]


def test_a_copy_is_another() -> None:
    options = filled()
    changed = options.copy()
    changed.causal, changed.mask = False, None
    assert fields_of(options) == FIELDS
    assert fields_of(changed) == {**FIELDS, "causal": False, "mask": None}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("wrong", [(), "1", object(), 1 << 80, -1, 1j])
def test_wrong_values_are_refused(name: str, wrong: Any) -> None:
    if wrong == -1 and (
        name in ("window_left", "window_right", "chunk", "distance_origin") or name.startswith("first_")
    ):
        return
    options = filled()
    with pytest.raises(TypeError, match=f"^Options: {name} cannot be "):
        setattr(options, name, wrong)
    with pytest.raises(TypeError, match=f"^Options: {name} cannot be "):
        delattr(options, name)
    assert fields_of(options) == FIELDS  # a refused value changes nothing


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("scale", [np.nan, np.inf, -1e39]),
        ("softcap", [np.nan, np.inf, -1.0, 1e-39]),
        ("dropout", [np.nan, np.inf, -0.25, 1.0]),
    ],
)
def test_the_core_itself_refuses_numbers_that_it_cannot_use(name: str, wrong: list[float]) -> None:
    x = np.ones((1, 1, 2, 1), np.float32)
    for value in wrong:
        options = _core.Options()
        setattr(options, name, value)
        out = x * 7
        with pytest.raises(ValueError, match=f"^attention: {name} is "):
            _core.attention(x, x, x, out, options)
        assert np.all(out == 7)


@pytest.mark.parametrize(
    ("shape", "origin", "message"),
    [
        ((), 0, r"shape \(\), but \(heads, distances\)"),
        ((2,), 0, r"shape \(2,\), but"),
        ((1, 2, 3), 0, r"shape \(1, 2, 3\), but"),
        ((2, 0), 0, r"shape \(2, 0\), but"),
        ((3, 5), 0, "for 3 heads, but q has 2"),
        ((2, 5), 5, "distance 0 in column 5, but its table has 5 columns"),
        ((2, 5), -1, "distance 0 in column -1"),
    ],
)
def test_the_core_itself_refuses_tables_of_distances_that_it_cannot_read(
    shape: tuple[int, ...], origin: int, message: str
) -> None:
    x = np.ones((1, 2, 3, 4), np.float32)
    out = x * 7
    options = _core.Options()
    options.distance_bias, options.distance_origin = np.zeros(shape), origin
    with pytest.raises(ValueError, match=f"^attention: t5 has .*{message}"):
        _core.attention(x, x, x, out, options)
    assert np.all(out == 7)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="casual"):
        _core.Options().casual = True  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"Options\(\) has no argument 'casual'"):
        _core.Options(casual=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Options\(\) takes keyword arguments only"):
        _core.Options(1)  # type: ignore[call-arg]
    x = np.zeros((1, 1, 1, 1), np.float32)
    for other in ((), None, {}):
        with pytest.raises(TypeError, match="Options"):
            _core.attention(x, x, x, None, other)  # type: ignore[arg-type]


def test_arrays_are_released() -> None:
    mask = np.ones(3, bool)
    before = sys.getrefcount(mask)
    options = _core.Options()
    options.mask = options.mask = mask
    changed = options.copy()
    changed.mask = None
    del options, changed
    assert sys.getrefcount(mask) == before


def test_names_have_the_numbers_of_the_core() -> None:
    for names, numbers in ((_typing.Layout, _core.LAYOUTS), (_typing.Precision, _core.PRECISIONS)):
        assert numbers == {name: number for number, name in enumerate(get_args(names))}
    assert list(_core.ACTIVATIONS) == ["none", *get_args(_linear.Activation)]


@pytest.mark.parametrize("number", [-1, 6, 1 << 40, None, "relu", 1.0])
def test_other_numbers_are_refused(number: Any) -> None:
    with pytest.raises(TypeError, match="is not the number of a choice"):
        _core.make_linear(_core.UnpackedLinear(w=np.eye(2)), number, _core.PRECISIONS["highest"])
    with pytest.raises(TypeError, match="is not the number of a choice"):
        _core.make_linear(_core.UnpackedLinear(w=np.eye(2)), _core.ACTIVATIONS["none"], number)
    rows = _core.CacheTokens(rows=np.zeros((1, 1, 1, 1), np.float32), width=1)
    with pytest.raises(TypeError, match="is not the number of a choice"):
        _core.make_cache_store(k=rows, v=rows, dtype=number, window=-1)


def test_element_types() -> None:
    assert set(_elements.ELEMENT_TYPES) == set(get_args(get_args(_typing.StorageType)[0]))
    for name, stored in _elements.ELEMENT_TYPES.items():
        assert np.dtype(stored.memory).itemsize == stored.word_bytes
        if stored.elements == 1:
            size = np.dtype(getattr(ml_dtypes, name, name)).itemsize
            assert [stored.row_bytes(count) for count in (0, 1, 3)] == [0, size, 3 * size]
    assert [name for name, stored in _elements.ELEMENT_TYPES.items() if stored.codes] == ["int8", "int4"]
    packed = _elements.ELEMENT_TYPES["int4"]
    assert [packed.row_bytes(count) for count in (0, 1, 32, 33)] == [0, 17, 17, 34]
    assert packed.element_bytes == 4.25 / 8
