"""What the package offers, for its command without arguments."""

from __future__ import annotations

import importlib.util
import inspect

import selfattn

_COMMANDS = {
    "selfattn info": "how it was built and what it runs on here",
    "selfattn selftest": "compares results with float64 on this machine",
    "selfattn demo TEXT": "draws where the words of a text look, in a trained model (extra examples)",
    "selfattn bench": "times it against NumPy, and PyTorch if installed",
}
# Modules that are not imported with the package, what they are for, what they need, and the extra that installs it.
_MODULES = {
    "selfattn.viz": ("pictures of attention weights", "matplotlib", "viz"),
    "selfattn.compat": ("functions of PyTorch, flash-attn and JAX, on arrays", "", ""),
    "selfattn.integrations.torch": ("inside PyTorch", "torch", "torch"),
    "selfattn.integrations.transformers": ("inside Hugging Face models", "transformers", "transformers"),
    "selfattn.integrations.jax": ("inside JAX", "jax", "jax"),
    "selfattn.distributed": ("over MPI ranks", "mpi4py", "mpi"),
}


def text() -> str:
    """Return the commands, the public names with their first lines, the modules, and what this machine has."""
    modules = {name: purpose + _missing(*needs) for name, (purpose, *needs) in _MODULES.items()}
    parts = [
        f"selfattn {selfattn.__version__}: exact, fused self-attention for CPUs",
        _table("Commands", _COMMANDS),
        _table("In Python, after `import selfattn as sa`", {f"sa.{name}": _summary(name) for name in _names()}),
        _table("Modules", modules),
        f"This machine: {selfattn.active_isa()}, up to {selfattn.get_num_threads()} threads. "
        "`help(sa.attention)` describes a function.",
    ]
    return "\n\n".join(parts)


def _names() -> list[str]:
    return [name for name in selfattn.__all__ if not name.startswith("_")]


def _summary(name: str) -> str:
    """Return the first sentence of an object's docstring, without marks of reStructuredText."""
    first = (inspect.getdoc(getattr(selfattn, name)) or "").partition("\n")[0].replace("`", "")
    return first.partition(". ")[0].rstrip(".")


def _missing(package: str = "", extra: str = "") -> str:
    if not package or importlib.util.find_spec(package):
        return ""
    return f" (needs {package}: pip install 'selfattn[{extra}]')"


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in rows.items())])
