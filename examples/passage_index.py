"""An index of passages: their embeddings, computed in ragged batches, kept in a file and updated."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import passages as cutting
from minilm import PACKAGE, MiniLM
from nn import Array
from passages import Passage, Unusable, cut

BATCH_TOKENS = 2048  # tokens that are embedded together: bounds the memory
# Versions and settings of an index. If they differ, the index is built again.
MADE_WITH = [1, PACKAGE, cutting.MAX_TOKENS, cutting.MIN_TOKENS, cutting.OVERLAP, cutting.MAX_PIECE, cutting.SHORT]

Report = Callable[[int, int], None]  # called with how many passages are embedded, and how many there are to embed


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came while passages were embedded; `index` holds the passages that are done."""

    def __init__(self, index: Index) -> None:
        super().__init__()
        self.index = index


@dataclass(frozen=True)
class Index:
    """Passages and their embeddings."""

    passages: list[Passage]
    embeddings: Array  # (passages, 384), each of length 1
    digests: dict[str, str] = field(default_factory=dict)  # of the files whose present contents are in the index

    def search(self, query: Array, top: int) -> list[tuple[float, Passage]]:
        """Return the passages nearest to a query's embedding, best first, with the cosines of the angles."""
        scores = self.embeddings @ query
        return [(float(scores[i]), self.passages[i]) for i in np.argsort(-scores, kind="stable")[:top]]


EMPTY = Index([], np.empty((0, 0), dtype=np.float32))


def refresh(old: Index, files: Iterable[tuple[str, bytes]], model: MiniLM, report: Report) -> Index:
    """Return the index of the files' present contents; embed only the passages that `old` does not have."""
    of_file: dict[str, list[Passage]] = {}
    for passage in old.passages:
        of_file.setdefault(passage.file, []).append(passage)
    found: list[Passage] = []
    digests: dict[str, str] = {}
    for name, data in files:
        digests[name] = hashlib.sha256(data).hexdigest()
        unchanged = old.digests.get(name) == digests[name]
        found += of_file.get(name, []) if unchanged else cut(name, data, model.count_tokens)
    if digests == old.digests:
        return old
    rows = {passage.text: row for row, passage in enumerate(old.passages)}
    embeddings = np.empty((len(found), model.bert.hidden_size), dtype=np.float32)
    done = np.zeros(len(found), dtype=bool)
    for i, passage in enumerate(found):
        if passage.text in rows:
            embeddings[i] = old.embeddings[rows[passage.text]]
            done[i] = True
    new, reused = np.flatnonzero(~done), int(done.sum())
    report(0, len(new))
    try:
        for batch in batches(new, [found[i].tokens for i in new]):
            embeddings[batch] = model.embed([found[i].text for i in batch])
            done[batch] = True
            report(int(done.sum()) - reused, len(new))
    except KeyboardInterrupt:
        kept = [passage for passage, finished in zip(found, done, strict=True) if finished]
        raise Interrupted(Index(kept, embeddings[done])) from None
    return Index(found, embeddings, digests)


def batches(rows: Array, tokens: list[int]) -> Iterator[Array]:
    """Yield the rows in batches of about BATCH_TOKENS, rows with few tokens first."""
    order = np.argsort(tokens, kind="stable")
    # A passage belongs to the batch that holds its last token, if all tokens are counted in this order.
    number = np.cumsum(np.asarray(tokens, dtype=np.int64)[order]) // BATCH_TOKENS
    for places in np.split(order, np.flatnonzero(np.diff(number)) + 1):
        if len(places):
            yield rows[places]


def load(file: Path) -> Index:
    """Return the index in a file, an empty one if there is none yet."""
    if not file.exists():
        return EMPTY
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            contents = json.loads(arrays["contents"].tobytes())
            embeddings = arrays["embeddings"]
        passages = [_passage(*values) for values in contents["passages"]]
        if embeddings.dtype != np.float32 or embeddings.ndim != 2 or len(embeddings) != len(passages):
            raise ValueError(f"{len(passages)} passages, but embeddings {embeddings.shape} {embeddings.dtype}")
        if not np.isfinite(embeddings).all():
            raise ValueError("embeddings that are not finite")
        made_with, digests = contents["made_with"], dict(contents["digests"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise Unusable(f"{file}: is no index that can be read ({error}); remove it, or name another file") from error
    return Index(passages, embeddings, digests) if made_with == MADE_WITH else EMPTY


def _passage(file: Any, line: Any, heading: Any, body: Any, tokens: Any) -> Passage:
    passage = Passage(file, line, heading, body, tokens)
    if [type(value) for value in astuple(passage)] != [str, int, str, str, int]:
        raise ValueError(f"no passage: {passage}")
    return passage


def save(index: Index, file: Path) -> None:
    """Write an index to a file. If that fails, the file stays as it was."""
    contents = {
        "made_with": MADE_WITH,
        "digests": index.digests,
        "passages": [astuple(passage) for passage in index.passages],
    }
    data = np.frombuffer(json.dumps(contents).encode(), dtype=np.uint8)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, contents=data, embeddings=index.embeddings)
        temporary.replace(file)
    except OSError as error:
        raise Unusable(f"{file}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
