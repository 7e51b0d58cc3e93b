"""Attention over MPI ranks (extra ``mpi``): see docs/distributed.md."""

from __future__ import annotations

try:
    import mpi4py as _mpi4py
except ImportError as error:
    raise ImportError("selfattn.distributed needs mpi4py: pip install 'selfattn[mpi]'") from error

from ..integrations._versions import check_version as _check_version

_check_version(_mpi4py)

from ._group import Group  # noqa: E402
from ._messages import MessageComm  # noqa: E402
from ._split_layer import SplitSelfAttention  # noqa: E402
from ._spread import SpreadCache  # noqa: E402

__all__ = ["Group", "MessageComm", "SplitSelfAttention", "SpreadCache"]
