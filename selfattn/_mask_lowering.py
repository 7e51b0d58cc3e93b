"""Masks as options of the core, which take no array and are faster."""

from __future__ import annotations

import numpy as np

from . import _core
from ._mask_kinds import Causal, Chunk, Dense, Limit, Prefix, Window
from ._mask_nodes import And, Mask, Or


def lowered(mask: Mask, options: _core.Options, lengths: tuple[int, int]) -> tuple[_core.Options, Mask | None]:
    """Return options that hide what they hid and a part of the mask, and the rest of the mask, if any.

    `lengths` are the numbers of queries and keys. A member of a conjunction becomes an option if that is exactly equal.
    The prefix of the options exempts from the causal option, but not from a mask; so nothing is lowered next to it.
    """
    own = options.copy()
    members = list(mask.members) if isinstance(mask, And) else [mask]
    if own.prefix_lens is None:
        _set_offset(own, members)
        members = [member for member in members if not _becomes_limit(member, own, lengths)]
        members = [member for member in members if not _becomes_prefix(member, own, lengths[1])]
    if not members:
        return own, None
    rest = members[0] if len(members) == 1 else And(*members)
    if isinstance(rest, Dense):
        own.mask = rest.values
        return own, None
    return own, rest


def _set_offset(options: _core.Options, members: list[Mask]) -> None:
    """Make the offset of causal members that of the call, if nothing else depends on the latter."""
    fixed = {member.offset for member in members if isinstance(member, Causal) and member.offset is not None}
    taken = options.q_offset is not None or options.alibi_slopes is not None or options.distance_bias is not None
    if len(fixed) == 1 and not (taken or _limits(options) or any(member.positional for member in members)):
        options.q_offset = np.array(fixed.pop())


def _limits(options: _core.Options) -> bool:
    return bool(options.causal or options.chunk or options.window_left >= 0 or options.window_right >= 0)


def _becomes_limit(member: Mask, options: _core.Options, lengths: tuple[int, int]) -> bool:
    """Whether the options now say what the member says."""
    if isinstance(member, Causal) and _is_offset(member.offset, options, lengths):
        options.causal = True
    elif isinstance(member, Window):
        options.window_left = _narrower(options.window_left, member.left)
        options.window_right = _narrower(options.window_right, member.right)
    elif isinstance(member, Chunk) and options.chunk in (0, member.size):
        options.chunk = member.size
    else:
        return False
    return True


def _is_offset(offset: int | None, options: _core.Options, lengths: tuple[int, int]) -> bool:
    """Whether an offset is that of the call in each batch entry."""
    if offset is None:
        return True
    if options.q_offset is not None:
        return bool(np.all(options.q_offset == offset))
    return options.q_lens is None and options.kv_lens is None and lengths[1] - lengths[0] == offset


def _narrower(one: int, other: int) -> int:
    """Return the smaller of two sides, of which -1 is unbounded."""
    return max(one, other) if min(one, other) < 0 else min(one, other)


def _becomes_prefix(member: Mask, options: _core.Options, kv_len: int) -> bool:
    """Whether the options now say what the member says: a prefix, joined by | with limits to the right."""
    if _limits(options) or not (isinstance(member, Or) and len(member.members) == 2):
        return False
    prefixes = [part for part in member.members if isinstance(part, Prefix)]
    others = [part for part in member.members if not isinstance(part, Prefix)]
    if len(prefixes) != 1:
        return False
    limits = others[0].members if isinstance(others[0], And) else others
    if not all(isinstance(x, Limit) and _is_to_the_right(x) for x in limits):
        return False
    for limit in limits:
        _becomes_limit(limit, options, (0, 0))
    options.prefix_lens = np.array(min(prefixes[0].n, kv_len))
    return True


def _is_to_the_right(limit: Limit) -> bool:
    return (isinstance(limit, Causal) and limit.offset is None) or (isinstance(limit, Window) and limit.left < 0)
