"""The speech example's input: WAV files, sampling rates, clips, and log-mel features."""

from __future__ import annotations

import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def sound(load_example: Any) -> Any:
    return load_example("sound")


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content


def wav(frames: bytes, width: int = 2, rate: int = 16000, channels: int = 1, kind: int = 1, rest: bytes = b"") -> bytes:
    size = width * channels
    form = chunk(b"fmt ", struct.pack("<HHIIHH", kind, channels, rate, rate * size, size, 8 * width) + rest)
    return chunk(b"RIFF", b"WAVE" + form + chunk(b"data", frames))


@pytest.fixture
def read(sound: Any, tmp_path: Path) -> Any:
    def run(content: bytes) -> Any:
        path = tmp_path / "sound.wav"
        path.write_bytes(content)
        return sound.read_wav(path)

    return run


VALUES = np.array([0, 1, -1, 100, -128, 127, 64])


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_samples_of_each_width(sound: Any, tmp_path: Path, width: int, channels: int) -> None:
    # The values are in the upper 8 bits. The channels hold 1, 2, 3 times the value, unless that would not fit.
    values = (VALUES[:, None] / channels).astype(int) * (1 + np.arange(channels))
    low = 3 if width > 1 else 0
    whole = values * 2 ** (8 * (width - 1)) + low + (128 if width == 1 else 0)
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(16000)
        file.writeframes(b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in whole.ravel()))
    wanted = values.mean(axis=1) / 128 + low / 2.0 ** (8 * width - 1)
    found = sound.read_wav(path)
    assert found.dtype == np.float32
    assert np.max(abs(found - wanted)) <= (0 if width < 3 and channels < 3 else 2.0**-24)


def test_pcm_with_the_longer_header(read: Any) -> None:
    guid = b"\x01\x00\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    rest = struct.pack("<HHI", 22, 24, 4) + guid
    content = wav(b"\x00\x00\x40\x00\x00\xc0", width=3, kind=0xFFFE, rest=rest)
    assert read(content).tolist() == [0.5, -0.5]
    with pytest.raises(ValueError, match="no WAV file of PCM samples: unknown "):
        read(content.replace(guid, b"\x03" + guid[1:]))


def test_a_file_of_unknown_length(read: Any) -> None:
    # As written to a pipe: the sizes in the header are the largest possible. The last frame is not complete.
    content = wav(b"\x00\x40\x00\xc0\x00")
    content = content.replace(b"data\x05\x00\x00\x00", b"data\xff\xff\xff\x7f")
    content = b"RIFF\xff\xff\xff\x7f" + content[8:]
    assert read(content).tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no WAV file of PCM samples: it ends too early"),
        (b"He went to Norway last month.", "does not start with RIFF id"),
        (wav(b"\0\0")[:30], "no WAV file of PCM samples"),
        (wav(b"\0" * 8, width=4, kind=3), "no WAV file of PCM samples: unknown format"),
        (wav(b""), "holds no samples"),
        (wav(b"\0"), "holds no samples"),
        (wav(b"\0\0", rate=0), "16 bits at 0 Hz"),
        (wav(b"\0\0", rate=2_000_000), "16 bits at 2000000 Hz"),
        (wav(b"\0" * 5, width=5), "40 bits at 16000 Hz"),
    ],
)
def test_files_that_it_refuses(read: Any, tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(content)
    assert str(tmp_path / "sound.wav") in str(caught.value)


def test_16_khz_passes_through(sound: Any, rng: np.random.Generator) -> None:
    samples = rng.standard_normal(1000, dtype=np.float32)
    assert np.array_equal(sound.resample(samples, 16000), samples)


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 22050, 32000, 44100, 44101, 48000, 192000])
def test_resampled_waves_keep_their_shape(sound: Any, rate: int) -> None:
    length = 2 * rate
    times, wanted_times = np.arange(length) / rate, np.arange(2 * 16000) / 16000
    for share in (0, 0.05, 0.4):  # of the rate that both sides hold
        frequency = share * min(rate, 16000)
        found = sound.resample(np.cos(2 * np.pi * frequency * times + 0.3).astype(np.float32), rate)
        assert found.dtype == np.float32
        assert found.shape == wanted_times.shape
        error = abs(found - np.cos(2 * np.pi * frequency * wanted_times + 0.3))
        assert np.max(error[8000:-8000]) <= 1e-3
    assert sound.resample(np.ones(1, dtype=np.float32), rate).shape == (-(-16000 // rate),)


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_what_16_khz_cannot_hold_is_removed(sound: Any, rate: int) -> None:
    times = np.arange(rate) / rate
    for frequency in np.linspace(8200, rate / 2 - 100, 7):
        found = sound.resample(np.sin(2 * np.pi * frequency * times).astype(np.float32), rate)
        assert np.max(abs(found[4000:-4000])) <= 3e-3


def test_clips_end_where_it_is_quiet(sound: Any, rng: np.random.Generator) -> None:
    samples = rng.standard_normal(70 * 16000, dtype=np.float32)
    quiet = (27.3, 10.0, 51.1)  # seconds; the second is not in any clip's last five
    for second in quiet:
        samples[int(second * 16000) :][:3200] *= 0.01
    parts = list(sound.clips(samples))
    assert np.array_equal(np.concatenate(parts), samples)
    assert [len(part) <= 30 * 16000 for part in parts] == [True] * 3
    first, second = len(parts[0]) / 16000, (len(parts[0]) + len(parts[1])) / 16000
    assert 27.3 < first < 27.5
    assert first + 25 <= second <= first + 30
    assert len(list(sound.clips(samples[: 30 * 16000]))) == 1
    assert len(list(sound.clips(samples[: 30 * 16000 + 1]))) == 2


def test_silence(sound: Any) -> None:
    assert sound.silent(np.zeros(0, dtype=np.float32))
    assert sound.silent(np.full(100, 9e-4, dtype=np.float32))
    assert not sound.silent(np.array([0, -0.01, 0], dtype=np.float32))


def to_hertz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * np.exp((mel - 15) * np.log(6.4) / 27)


def plain_log_mel(samples: Any) -> Any:
    """Each step by its definition: a Fourier sum instead of an FFT, each triangle by interpolation."""
    sound = np.zeros(480_000 + 400)
    sound[200 : 200 + len(samples)] = samples
    sound[:200], sound[-200:] = sound[400:200:-1], sound[-202:-402:-1]
    angles = 2 * np.pi * np.outer(np.arange(400), np.arange(201)) / 400
    frames = np.stack([sound[160 * i : 160 * i + 400] for i in range(3000)]) * np.sin(np.pi * np.arange(400) / 400) ** 2
    power = (frames @ np.cos(angles)) ** 2 + (frames @ np.sin(angles)) ** 2
    highest = 15 + 27 * np.log(8) / np.log(6.4)
    edges = [to_hertz(highest * i / 81) for i in range(82)]
    hertz = 40.0 * np.arange(201)
    triangles = [
        np.interp(hertz, edges[i : i + 3], [0, 2 / (edges[i + 2] - edges[i]), 0], left=0, right=0) for i in range(80)
    ]
    logarithms = np.log10(np.clip(power @ np.array(triangles).T, 1e-10, None))
    return (np.clip(logarithms, logarithms.max() - 8, None) + 4) / 4


@pytest.fixture
def chirps(rng: np.random.Generator) -> list[Any]:
    times = np.arange(30 * 16000) / 16000
    whole = 0.4 * np.sin(2 * np.pi * (100 * times + 120 * times**2)) + 1e-3 * rng.standard_normal(len(times))
    return [whole.astype(np.float32), whole[:50_001].astype(np.float32), np.zeros(0, dtype=np.float32)]


def test_features_against_their_definition(sound: Any, chirps: list[Any]) -> None:
    for samples in chirps:
        found = sound.log_mel(samples)
        assert found.dtype == np.float32
        assert found.shape == (3000, 80)
        assert np.max(abs(found - plain_log_mel(samples))) <= 1e-5


def test_features_against_transformers(sound: Any, chirps: list[Any]) -> None:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor()
    for samples in chirps:
        wanted = extractor(samples, sampling_rate=16000, return_tensors="np").input_features[0]
        assert np.max(abs(sound.log_mel(samples).T - wanted)) <= 1e-4
