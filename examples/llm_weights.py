"""The files of a language model that `transformers` saved in a folder: settings, weights and tokenizer.

Weights are mapped into memory and converted when they are asked for, so that a model is read only once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nn import Array

CONFIG, TOKENIZER, WEIGHTS = FILES = ("config.json", "tokenizer.json", "model.safetensors")
INDEX = "model.safetensors.index.json"  # names the file of each weight if there are several files
STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # uint16: the bits


def read_json(path: Path) -> Any:
    """Return what a file of the folder says."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing")
    return json.loads(path.read_text(encoding="utf8"))


def end_tokens(folder: Path, config: Mapping[str, Any]) -> set[int]:
    """Return the tokens that end a text."""
    path = folder / "generation_config.json"
    chosen = read_json(path).get("eos_token_id") if path.is_file() else None
    ends = config.get("eos_token_id") if chosen is None else chosen
    return set() if ends is None else set(np.atleast_1d(ends).tolist())


class Weights(Mapping[str, Array]):
    """The weights of a folder by name, in one dtype: "float32" or "bfloat16" (of the package `ml_dtypes`)."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        if dtype == "bfloat16":
            from ml_dtypes import bfloat16

            self.dtype = np.dtype(bfloat16)
        else:
            self.dtype = np.dtype(dtype)
        files = {WEIGHTS}
        if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
            files = set(read_json(folder / INDEX)["weight_map"].values())
        self.found: dict[str, tuple[str, Array]] = {}
        for name in sorted(files):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{name} is missing")
            self.found |= stored_arrays(folder / name)
        self.prefix = ""

    def below(self, prefix: str) -> Weights:
        """Return the weights whose names start so, without the start."""
        part = Weights.__new__(Weights)
        part.dtype, part.found, part.prefix = self.dtype, self.found, self.prefix + prefix
        return part

    def __getitem__(self, name: str) -> Array:
        if name not in self:
            raise KeyError(f"the weight {self.prefix}{name} is missing")
        kind, array = self.found[self.prefix + name]
        if kind not in STORED:
            raise ValueError(
                f"the weight {self.prefix}{name} is stored as {kind}, which is none of {', '.join(STORED)}"
            )
        if kind != "BF16":
            return array.astype(self.dtype)
        if self.dtype.itemsize == 2:
            return np.array(array).view(self.dtype)
        return (array.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of float32

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}" in self.found

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.found if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def stored_arrays(path: Path) -> dict[str, tuple[str, Array]]:
    """Return the arrays of a file in safetensors' format with the names of their types: a length, JSON, then bytes."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            array = data[start + first : start + last]
            if entry["dtype"] in STORED:
                array = array.view(STORED[entry["dtype"]]).reshape(entry["shape"])
            arrays[name] = entry["dtype"], array
    return arrays
