"""Options of the training programs: what is impossible is refused before the training, as is another run's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

TINY = {
    "train": "--layers 1 --width 16 --heads 2 --length 16 --batch 2 --write 2 --steps 1",
    "train_translation": "--layers 1 --width 16 --heads 2 --batch 2 --test 5 --show 1 --steps 1",
}
EVERY = ("train", "train_translation", "finetune")
IMPOSSIBLE = {
    "--seed -1": "--seed must be at least 0, not -1",
    "--batch 0": "--batch must be at least 1, not 0",
    "--rate 0": "--rate must be a positive number, not 0.0",
    "--rate nan": "--rate must be a positive number, not nan",
    "--rate inf": "--rate must be a positive number, not inf",
}
PICTURES = {
    "none/loss.png": "cannot be written: No such file or directory",
    "file.txt/loss.png": "cannot be written: Not a directory",
    "folder.png": "is a folder, not a file",
    "loss": "the name must end with .",
    "loss.xyz": "the name must end with .",
}
CHECKPOINTS = {
    "none/kept.npz": "cannot be written: No such file or directory",
    "file.txt/kept.npz": "cannot be written: Not a directory",
    "folder.png": "is a folder, not a file",
    "/": "is a folder, not a file",
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").write_text("A text to learn from. " * 5, encoding="utf8")


@pytest.fixture
def run(load_example: Any) -> Any:
    """Run a program on a tiny model."""

    def call(program: str, *more: str) -> int:
        place = ["."] if program == "train" else []
        returned: int = load_example(program).main([*place, *TINY[program].split(), *more])
        return returned

    return call


def refused(load_example: Any, program: str, options: list[str], capsys: Any) -> str:
    """Return the message with which a program refuses options; it must refuse them while it parses them."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        load_example(program).parse(options)
    assert sorted(Path.cwd().rglob("*")) == before, "the check leaves no file"
    message: str = capsys.readouterr().err
    return message


@pytest.mark.parametrize("program", EVERY)
def test_impossible_numbers(load_example: Any, program: str, capsys: Any) -> None:
    for options, message in IMPOSSIBLE.items():
        assert message in refused(load_example, program, options.split(), capsys), options


@pytest.mark.parametrize("program", EVERY)
def test_pictures_that_cannot_be_written(load_example: Any, program: str, capsys: Any) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    for path, message in PICTURES.items():
        assert f"--picture {path}" in (found := refused(load_example, program, ["--picture", path], capsys))
        assert message in found, path


@pytest.mark.parametrize("program", TINY)
def test_checkpoints_that_cannot_be_written(load_example: Any, program: str, capsys: Any) -> None:
    for path, message in CHECKPOINTS.items():
        assert f"--checkpoint {path} {message}" in refused(load_example, program, ["--checkpoint", path], capsys)
    for seconds in ("-1", "nan"):
        assert "--save-every must be" in refused(load_example, program, ["--save-every", seconds], capsys)


def test_impossible_numbers_of_single_programs(load_example: Any, capsys: Any) -> None:
    assert "--write must be at least 0, not -5" in refused(load_example, "train", ["--write", "-5"], capsys)
    assert "--warm-up must be at least 0, not -1" in refused(load_example, "train", ["--warm-up", "-1"], capsys)
    assert "--warm-up must be at least 1" in refused(load_example, "train_translation", ["--warm-up", "0"], capsys)
    for program in TINY:
        message = refused(load_example, program, ["--width", "32", "--heads", "5"], capsys)
        assert "--heads 5 must divide --width 32" in message


def test_without_matplotlib_the_picture_does_not_matter(load_example: Any, monkeypatch: Any) -> None:
    options = load_example("training_options")
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    assert load_example("train").parse(["--picture", "none/loss"]).picture == Path("none/loss")


@pytest.mark.parametrize("program", TINY)
def test_the_checks_leave_files_as_they_are(load_example: Any, program: str) -> None:
    before = sorted(Path.cwd().iterdir())
    load_example(program).parse(["--checkpoint", "kept.npz"])
    assert sorted(Path.cwd().iterdir()) == before
    for name in ("kept.npz", "loss.png"):
        Path(name).write_bytes(b"as it was")
    load_example(program).parse(["--checkpoint", "kept.npz", "--resume"])
    assert [Path(name).read_bytes() for name in ("kept.npz", "loss.png")] == [b"as it was"] * 2


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("train", "--heads 4"),
        ("train", "--layers 2"),
        ("train", "--width 32"),
        ("train", "--length 20"),
        ("train_translation", "--heads 4"),
        ("train_translation", "--seed 1"),
        ("train_translation", "--test 6"),
    ],
)
def test_another_model_is_not_continued(run: Any, program: str, options: str) -> None:
    assert run(program, "--checkpoint", "kept.npz") == 0
    name, value = options.split()
    with pytest.raises(SystemExit, match=rf"kept\.npz is of a run with {name} \d+, not {value}$"):
        run(program, "--checkpoint", "kept.npz", "--resume", "--steps", "2", name, value)


def test_damaged_and_foreign_checkpoints_are_not_continued(run: Any) -> None:
    assert run("train", "--checkpoint", "kept.npz") == 0
    whole = Path("kept.npz").read_bytes()
    with pytest.raises(SystemExit, match=r"kept\.npz is a checkpoint of another program"):
        run("train_translation", "--checkpoint", "kept.npz", "--resume")
    np.savez("other.npz", x=np.zeros(3))
    np.save("single.npy", np.zeros(3))
    other = {"other.npz": Path("other.npz").read_bytes(), "single.npy": Path("single.npy").read_bytes()}
    for content in (b"", b"text", whole[: len(whole) // 2], *other.values()):
        Path("kept.npz").write_bytes(content)
        with pytest.raises(SystemExit, match=r"kept\.npz is not a whole checkpoint of this program"):
            run("train", "--checkpoint", "kept.npz", "--resume")
