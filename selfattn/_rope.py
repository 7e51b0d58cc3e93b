"""Descriptions of rotary position embedding, and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import flag, integers, real, reals
from ._errors import refusal
from ._frequencies import MOST_ROTATED, frequencies
from ._keywords import hinted
from ._rope_config import from_config


@hinted
@dataclass(frozen=True)
class RoPE:
    """A description of rotary position embedding (Su et al., "RoFormer", 2021).

    Parameters
    ----------
    base : float, default 10000.0
        Pair i is rotated by ``position · base^(−2 i / rotary_dim)`` radians.
    rotary_dim : int, optional
        Even; only the first rotary_dim elements of a head are rotated. Default: all of them, or two for each number in
        `inv_freq`.
    interleaved : bool, default False
        False: element i pairs with ``i + rotary_dim / 2`` (Llama, GPT-NeoX). True: adjacent elements pair (GPT-J).
    inv_freq : array_like, shape (rotary_dim / 2,), optional
        Instead of `base`: pair i is rotated by ``position · inv_freq[i]`` radians. Kept as a tuple, in double
        precision.
    attention_scaling : float, default 1.0
        Factor of the rotated elements (YaRN, LongRoPE).
    axes : sequence of int, length rotary_dim / 2, optional
        For positions with several coordinates, such as the time, row and column of a part of a video. Pair i is rotated
        by coordinate ``axes[i]``, and `positions` has a leading axis of ``max(axes) + 1`` coordinates.

    Raises
    ------
    TypeError, ValueError
        `base` is not a positive number, or `rotary_dim` is odd or below 2.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rope = sa.RoPE(base=500000.0, rotary_dim=32)
    >>> sa.apply_rope(np.ones((10, 64)), rope=rope).shape
    (10, 64)
    >>> rows_and_columns = sa.RoPE(inv_freq=[1.0, 0.1, 1.0, 0.1], axes=[0, 0, 1, 1])
    >>> patches = np.ones((12, 8), dtype=np.float32)
    >>> sa.apply_rope(patches, np.indices((3, 4)).reshape(2, 12), rows_and_columns).shape
    (12, 8)
    """

    base: float = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = False
    inv_freq: ArrayLike | None = field(default=None, kw_only=True)
    attention_scaling: float = field(default=1.0, kw_only=True)
    axes: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if real("RoPE", "base", self.base) < 1e-300:  # powers of smaller numbers overflow
            raise refusal(ValueError, "RoPE", "base", f" is {self.base!r}, but it must be finite and at least 1e-300")
        flag("RoPE", "interleaved", self.interleaved)
        if self.rotary_dim is not None and (
            isinstance(self.rotary_dim, bool) or not isinstance(self.rotary_dim, (int, np.integer))
        ):
            raise refusal(TypeError, "RoPE", "rotary_dim", f" is {self.rotary_dim!r}, but an integer is needed")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise refusal(
                ValueError, "RoPE", "rotary_dim", f" is {self.rotary_dim!r}, but it must be even and at least 2"
            )
        if real("RoPE", "attention_scaling", self.attention_scaling) <= 0:
            text = f" is {self.attention_scaling!r}, but it must be greater than 0"
            raise refusal(ValueError, "RoPE", "attention_scaling", text)
        if self.inv_freq is not None:
            self._keep_frequencies(self.inv_freq)
        if self.axes is not None:
            self._keep_axes(self.axes)

    def _keep_frequencies(self, given: ArrayLike) -> None:
        array = reals("RoPE", "inv_freq", given)
        _check_count("inv_freq", array.size, MOST_ROTATED // 2)
        if array.ndim != 1 or not array.size or not np.isfinite(array).all():
            text = f" has shape {array.shape}, but" if array.ndim != 1 or not array.size else " is not finite:"
            raise refusal(ValueError, "RoPE", "inv_freq", f"{text} one finite number for each pair is needed")
        if self.base != RoPE.base:
            raise refusal(ValueError, "RoPE", "inv_freq", " is given together with ", "base", ": pass one of them")
        if self.rotary_dim is not None and self.rotary_dim != 2 * len(array):
            text = f" is {self.rotary_dim}: twice as many are needed"
            raise refusal(ValueError, "RoPE", "inv_freq", f" has {len(array)} numbers but ", "rotary_dim", text)
        object.__setattr__(self, "inv_freq", tuple(array.tolist()))
        object.__setattr__(self, "rotary_dim", 2 * len(array))

    def _keep_axes(self, given: Sequence[int]) -> None:
        array = integers("RoPE", "axes", given)
        _check_count("axes", array.size, MOST_ROTATED // 2)
        if array.ndim != 1 or not array.size or np.min(array) < 0:
            text = f" is {given!r}, but a coordinate from 0 for each pair is needed"
            raise refusal(ValueError, "RoPE", "axes", text)
        object.__setattr__(self, "axes", tuple(array.tolist()))

    @classmethod
    @hinted
    def from_config(
        cls,
        config: Any,
        *,
        layer_type: str | None = None,
        head_dim: int | None = None,
        seq_len: int | None = None,
        interleaved: bool | None = None,
    ) -> RoPE:
        """Return the rotary embedding of a model of Hugging Face's transformers.

        Parameters
        ----------
        config : dict
            What `config.json` holds, of the text part if the model has several; or an object with a method
            ``to_dict()``. The parameters are in "rope_parameters" or, in older files, in "rope_scaling" and next to it.
            The ``rope_type`` is "default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional" or
            "axial"; "mrope_section", and "mrope_interleaved" if it is true, say which coordinate rotates which pair.
        layer_type : str, optional
            For models whose types of layers differ: "full_attention", "sliding_attention" or what the file names.
        head_dim : int, optional
            Default: what the file says. Needed if types of layers have heads of different sizes.
        seq_len : int, optional
            How many tokens sequences will have. The frequencies of "dynamic" and "longrope" depend on it beyond the
            length of training.
        interleaved : bool, optional
            Whether adjacent elements pair. Default: "rope_interleave" of the file, or False. Most files do not say
            it: True is right for GPT-J, Cohere, GLM, Helium and ERNIE 4.5.

        Raises
        ------
        ValueError
            A key is missing, unknown for this ``rope_type``, or its value is not possible.
        TypeError
            A value has a wrong type.

        Notes
        -----
        The formulas are those of transformers 5, in double precision. Some models also multiply scores or queries by a
        number that grows with the context; that is not part of the rotation.

        Examples
        --------
        >>> import selfattn as sa
        >>> config = {"hidden_size": 64, "num_attention_heads": 8, "rope_theta": 500000.0}
        >>> sa.RoPE.from_config(config) == sa.RoPE(inv_freq=[500000.0 ** (-i / 4) for i in range(4)])
        True
        """
        given = None if interleaved is None else flag("RoPE.from_config", "interleaved", interleaved)
        found = from_config(config, layer_type, head_dim, seq_len)
        return cls(
            interleaved=found.interleaved if given is None else given,
            inv_freq=found.inv_freq,
            attention_scaling=found.attention_scaling,
            axes=found.axes,
        )

    @property
    def coordinates(self) -> int | None:
        """How many coordinates a position has; None if it is a single number."""
        return None if self.axes is None else max(self.axes) + 1

    def for_core(self, function: str, head_dim: int) -> _core.Rope:
        """Return the rotation of heads of this size."""
        rotary_dim = head_dim if self.rotary_dim is None else int(self.rotary_dim)
        if rotary_dim > head_dim or rotary_dim % 2:
            raise refusal(
                ValueError,
                function,
                "rope",
                f" rotates {rotary_dim} elements, but head_dim is {head_dim}: rotary_dim must be even and at "
                "most head_dim",
            )
        if rotary_dim > MOST_ROTATED:
            text = f" rotates {rotary_dim} elements, but at most {MOST_ROTATED} are supported"
            raise refusal(ValueError, function, "rope", text)
        if self.axes is not None and 2 * len(self.axes) != rotary_dim:
            text = f" rotates {rotary_dim // 2} pairs, but has {len(self.axes)} axes: one for each pair is needed"
            raise refusal(ValueError, function, "rope", text)
        return _tables(self, rotary_dim)


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise refusal(ValueError, "RoPE", name, f" has {count} numbers, but at most {most} are supported")


@lru_cache(maxsize=256)
def _tables(rope: RoPE, rotary_dim: int) -> _core.Rope:
    plain = frequencies(float(rope.base), rotary_dim) if rope.inv_freq is None else np.array(rope.inv_freq)
    return _core.Rope(
        frequencies=plain,
        axes=None if rope.axes is None else np.array(rope.axes, np.int64),
        scaling=float(rope.attention_scaling),
        interleaved=bool(rope.interleaved),
    )


PLAIN = RoPE()


def rope_or_none(function: str, rope: Any) -> RoPE | None:
    """Return the `RoPE` that a `rope=` argument means, or None."""
    if rope is None or rope is False:
        return None
    if rope is True:
        return PLAIN
    if not isinstance(rope, RoPE):
        raise refusal(TypeError, function, "rope", f" is {rope!r}, but a RoPE, True or None is needed")
    return rope


def positions_for(function: str, positions: Any, shape: tuple[int, ...], rope: RoPE) -> NDArray[np.int64]:
    """Return positions, checked to broadcast to `shape` = (..., S), after the axis of coordinates if there is one."""
    array = integers(function, "positions", positions)
    own, count = array.shape, rope.coordinates
    if count is not None:
        if array.ndim < 2 or own[0] not in (1, count):
            text = f" has shape {own}, but (coordinates, ..., S) is needed, with {count} coordinates for "
            raise refusal(ValueError, function, "positions", text, "rope", "")
        own = own[1:]
    try:
        fits = np.broadcast_shapes(own, shape) == shape and len(own) > 0
    except ValueError:
        fits = False
    if not fits:
        raise refusal(ValueError, function, "positions", f" has shape {own}, which does not broadcast to {shape}")
    return array


def places_for(rope: RoPE, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return places (..., S) in sequences as positions, all of whose coordinates are equal."""
    return places if rope.axes is None else places[np.newaxis]
