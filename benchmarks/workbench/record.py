"""Reads results from JSON files written by benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfattn._bench.measure import Result


def read_records(paths: Sequence[str | Path]) -> tuple[dict[str, Any], list[Result]]:
    """Read files of one machine as if they were one.

    Returns
    -------
    record : dict
        The first file's record, with the versions, missing peers and results of all files.
    results : list of Result
        In the order of the files; if a workload was measured repeatedly, the last result counts.

    Raises
    ------
    ValueError
        If the files come from different processors or instruction sets.
    """
    records = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    entries = [entry for record in records for entry in record["results"]]
    processors = {record["machine"]["processor"] for record in records}
    for names in (sorted(processors), sorted({entry["isa"] for entry in entries})):
        if len(names) > 1:
            raise ValueError(f"bench: the files do not belong together: {', '.join(names)}")
    latest = {(entry["workload"]["name"], entry["threads"]): entry for entry in entries}
    versions = {name: version for record in records for name, version in record["versions"].items()}
    missing = [name for name in records[0]["missing"] if name not in versions]
    merged = {**records[0], "versions": versions, "missing": missing, "results": list(latest.values())}
    return merged, [Result.from_dict(entry) for entry in latest.values()]
