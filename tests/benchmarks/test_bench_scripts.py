"""The benchmark's scripts and the package's command: what they list, print and write. Nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys

from places import BENCHMARKS

import workbench  # noqa: F401  # registers the peers of the scripts
from selfattn._bench.peers import PEERS
from selfattn._bench.workloads import WORKLOADS


def run_script(name: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_attention_script(tmp_path):
    listed = [line.split()[0] for line in run_script("attention.py", "--list").splitlines()]
    assert listed == list(WORKLOADS)
    file = tmp_path / "r.json"
    options = ["--workloads", "tiny-16", "decode-4k-gqa", "--peers", "numpy", "--seconds", "0.02"]
    printed = run_script("attention.py", *options, "--threads", "1", "2", "--json", str(file))
    assert printed.count("decode-4k-gqa") == 2
    assert len(json.loads(file.read_text())["results"]) == 4


def test_attention_script_has_the_grid_and_all_peers_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--workloads", "few-2x3000", "--peers", "numpy", "single", "--seconds", "0.02", "--threads", "1"]
    assert f"vs {PEERS['single'].label}" in run_script("attention.py", *options)


def test_the_command_of_the_package_has_its_own_peers_only(run_python):
    code = "import sys\nfrom selfattn.__main__ import main\nmain(['bench', '--peers', 'nobody'])"
    code += "\nassert not any(name.startswith('workbench') for name in sys.modules)"
    assert run_python(code + "\nfrom selfattn._bench.peers import PEERS\nprint(*PEERS)") == "selfattn numpy pytorch\n"


def test_the_readme_names_every_file_of_the_workbench():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf8")
    names = {file.name for file in (BENCHMARKS / "workbench").glob("*.py")} - {"__init__.py"}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_two_installations_are_compared_in_turns():
    options = ["--other", sys.executable, "--seconds", "0.01", "--calls", "tiny-16 f32", "pages of 16 int8"]
    *_, tiny, pages, last = run_script("builds.py", *options).splitlines()
    assert tiny.startswith("tiny-16 f32 ")
    assert pages.startswith("pages of 16 int8 ")
    assert last.startswith("geometric mean of 2: ")
