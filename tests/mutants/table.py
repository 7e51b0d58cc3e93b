"""The table of mutants: one wrong line each, which the tests must notice. See the .toml files in this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # from the project's root
    old: str  # occurs exactly once in the file
    new: str
    why: str  # the purpose of the original
    first: str  # the test module that should notice, "errors" or "core/errors"; the rest of its folder runs after it
    equivalent: str = ""  # why no test can notice, where that is so
    matrix: bool = False  # of code for matrix units, which the portable build does not have

    def module(self, root: Path) -> Path:
        """Return the test module that should notice, in a copy of the project."""
        (module,) = self._modules(root)
        return module

    def _modules(self, root: Path) -> list[Path]:
        folder, _, name = self.first.rpartition("/")
        return list((root / "tests" / folder).rglob(f"test_{name}.py"))

    def problem(self) -> str:
        """Return why the mutant cannot be made, or nothing."""
        count = (ROOT / self.file).read_text(encoding="utf8").count(self.old)
        if self.old == self.new:
            return "changes nothing"
        if len(self._modules(ROOT)) != 1:
            return f"{len(self._modules(ROOT))} test modules instead of one are called {self.first}"
        if self.matrix and "mark.matrix" not in self.module(ROOT).read_text(encoding="utf8"):
            return f"no test of {self.first} is marked `matrix`"
        return "" if count == 1 else f"{self.file} holds {count} times, instead of once: {self.old}"


def load() -> list[Mutant]:
    mutants = [
        Mutant(**entry)
        for file in sorted(HERE.glob("*.toml"))
        for entry in tomllib.loads(file.read_text(encoding="utf8"))["mutant"]
    ]
    names = [mutant.name for mutant in mutants]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"duplicate names: {', '.join(sorted(twice))}")
    return mutants
