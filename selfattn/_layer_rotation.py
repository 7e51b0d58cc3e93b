"""The rotation of a layer's queries and keys, forwards and backwards."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

from . import _core
from ._errors import refusal
from ._rope import RoPE, positions_for, rope_or_none


class Rotation(NamedTuple):
    """How queries and keys are rotated: rope, the same for the core, and positions of the tokens of x; or None."""

    function: str
    rope: RoPE | None
    core: _core.Rope | None
    positions: Any

    @classmethod
    def check(cls, function: str, rope: Any, positions: Any, head_dim: int) -> Rotation:
        description = rope_or_none(function, rope)
        if description is not None:
            return cls(function, description, description.for_core(function, head_dim), positions)
        if positions is not None:
            raise refusal(ValueError, function, "positions", " is given, but the layer has no rope")
        return cls(function, None, None, None)

    def placed(self, x: NDArray[Any]) -> Rotation:
        """Return the rotation with checked positions for x."""
        if self.rope is None or self.positions is None:
            return self
        return self._replace(positions=positions_for(self.function, self.positions, x.shape[:-1], self.rope))

    def apply(self, heads: NDArray[Any], positions: Any, *, inverse: bool) -> None:
        """Rotate (..., tokens, heads, head_dim) in place."""
        if self.core is not None:
            _core.apply_rope(heads, positions, heads, self.core, inverse, 1)
