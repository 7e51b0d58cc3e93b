"""Mutation testing: break one line at a time and see whether the tests notice.

    python tests/mutants/run.py                 all mutants
    python tests/mutants/run.py --sample 6      six of them, others at every commit
    python tests/mutants/run.py --changed REV   those in folders where something changed since a revision; if there are
                                                none, those of --sample
    python tests/mutants/run.py --only NAME     one; may be repeated
    python tests/mutants/run.py --check         only whether every mutant's line still exists

Needs numpy, pybind11, cmake, ninja and what the tests need, but no installed selfattn.
"""

from __future__ import annotations

import argparse
import queue
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sandbox import Sandbox
from table import ROOT, Mutant, load

LEAST_KILLED = 0.9


def git(*arguments: str) -> str:
    """Return what git prints, or nothing if the project is not in a repository."""
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return result.stdout


def changed_folders(revision: str) -> set[Path]:
    """Return the folders of files that differ from a revision."""
    names = git("diff", "--name-only", revision).splitlines()
    if not names:
        sys.exit(f"nothing differs from {revision}, or it is no revision")
    return {Path(name).parent for name in names}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant; may be repeated")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants, chosen by the commit or --seed")
    parser.add_argument("--seed", default=git("rev-parse", "HEAD").strip())
    parser.add_argument("--changed", metavar="REV", help="all mutants of folders that differ from this revision")
    parser.add_argument("--jobs", type=int, default=1, help="builds and tests at a time")
    parser.add_argument("--check", action="store_true", help="only whether every mutant's line still exists")
    return parser.parse_args()


def choose(mutants: list[Mutant], arguments: argparse.Namespace) -> list[Mutant]:
    if arguments.only:
        unknown = set(arguments.only) - {mutant.name for mutant in mutants}
        if unknown:
            sys.exit(f"no such mutant: {', '.join(sorted(unknown))}")
        return [mutant for mutant in mutants if mutant.name in arguments.only]
    if arguments.changed:
        folders = changed_folders(arguments.changed)
        chosen = [mutant for mutant in mutants if Path(mutant.file).parent in folders]
        if chosen or not arguments.sample:
            return chosen
        print(f"no mutant is in a folder that differs from {arguments.changed}: a sample runs instead")
    if arguments.sample:
        able = [mutant for mutant in mutants if not mutant.equivalent]
        return random.Random(arguments.seed).sample(able, min(arguments.sample, len(able)))
    return mutants


def prepare(folder: Path, *, matrix: bool) -> Sandbox:
    sandbox = Sandbox(folder, matrix=matrix)
    sandbox.configure()
    if complaint := sandbox.build():
        sys.exit(f"the project itself does not compile\n{complaint}")
    sandbox.check_import()
    return sandbox


def run_all(mutants: list[Mutant], jobs: int) -> dict[str, list[Mutant]]:
    """Run them, print a line each, and return them by their fate."""
    fates: dict[str, list[Mutant]] = {}
    for matrix in (False, True):
        group = [mutant for mutant in mutants if mutant.matrix == matrix]
        if matrix and group and not has_matrix_unit():
            print(f"skipped: {len(group)} mutants of matrix units, which need a processor with AVX512_BF16")
        elif group:
            run_group(group, jobs, fates, matrix=matrix)
    return fates


def has_matrix_unit() -> bool:
    """Whether this processor can run, or at least emulate, every matrix unit."""
    information = Path("/proc/cpuinfo")
    return information.exists() and "avx512_bf16" in information.read_text(encoding="utf8")


def run_group(mutants: list[Mutant], jobs: int, fates: dict[str, list[Mutant]], *, matrix: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        sandboxes: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        for i in range(jobs):
            sandboxes.put(prepare(Path(folder).resolve() / str(i), matrix=matrix))
        first = sandboxes.get()
        for place in {mutant.module(first.folder).parent for mutant in mutants}:
            verdict, seen = first.test(place)
            if verdict != "passed":
                sys.exit(f"the tests fail without any mutant\n{seen}")
        sandboxes.put(first)

        def run(mutant: Mutant) -> None:
            sandbox = sandboxes.get()
            start = time.monotonic()
            fate, seen = sandbox.run(mutant)
            sandboxes.put(sandbox)
            fates.setdefault(fate, []).append(mutant)
            seen = seen.replace(str(sandbox.folder) + "/", "") if fate in ("killed", "survived") else "\n" + seen
            print(f"{fate:8} {mutant.name} ({time.monotonic() - start:.0f} s) {seen}", flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, mutants))


def report(fates: dict[str, list[Mutant]]) -> bool:
    """Print the sum; whether the tests are good enough and the table is right."""
    killed = fates.pop("killed", [])
    survived = fates.pop("survived", [])
    gaps = [mutant for mutant in survived if not mutant.equivalent]
    for mutant in gaps:
        print(f"survived: {mutant.name}, although {mutant.why} ({mutant.file}: {mutant.new or 'removed'})")
    noticed = [mutant.name for mutant in killed if mutant.equivalent]
    if noticed:
        print(f"called equivalent, but killed: {', '.join(noticed)}")
    for fate, mutants in fates.items():
        print(f"{fate}: {', '.join(mutant.name for mutant in mutants)}")
    total = len(killed) + len(gaps)
    share = len(killed) / total if total else 1.0
    print(f"{len(killed)} of {total} killed ({share:.0%}), {len(survived) - len(gaps)} equivalent")
    return share >= LEAST_KILLED and not noticed and not fates


def main() -> None:
    arguments = parse()
    mutants = load()
    if problems := [f"{mutant.name}: {problem}" for mutant in mutants if (problem := mutant.problem())]:
        sys.exit("mutants that do not apply:\n" + "\n".join(problems))
    if arguments.check:
        print(f"{len(mutants)} mutants apply")
        return
    fates = run_all(choose(mutants, arguments), arguments.jobs)
    if not fates:
        sys.exit("no mutant was run, so nothing was tested")
    if not report(fates):
        sys.exit(1)


if __name__ == "__main__":
    main()
