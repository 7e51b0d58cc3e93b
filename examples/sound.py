"""From a WAV file to Whisper's input: samples, resampling to 16 kHz, clips, and log-mel features."""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from nn import Array

SAMPLE_RATE, CLIP = 16000, 480_000  # a clip of 30 s
FRAME, HOP, BANDS = 400, 160, 80
RATES, CROSSINGS = range(1000, 1_000_001), 32
QUIET = 1e-3  # below -60 dB there is no speech
WINDOWS = np.lib.stride_tricks.sliding_window_view


def read_wav(path: Path) -> Array:
    """Return a file's samples at 16 kHz, from -1 to 1, its channels averaged.

    The file holds integers of 8, 16, 24 or 32 bits (PCM). ValueError names any other format.
    """
    data = bytearray(path.read_bytes())
    form = data.find(b"fmt ", 12) + 8
    if data[form : form + 2] == b"\xfe\xff" and data[form + 24 : form + 26] == b"\x01\x00":
        # PCM with a longer header, as many programs write it for more than 16 bits; `wave` knows it from Python 3.12.
        data[form : form + 2] = b"\x01\x00"
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate, count = file.getparams()[:4]
            frames = file.readframes(count)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is no WAV file of PCM samples: {str(error) or 'it ends too early'}") from error
    if width not in (1, 2, 3, 4) or rate not in RATES:
        raise ValueError(f"{path} has {8 * width} bits at {rate} Hz, but 8 to 32 bits at 1 kHz to 1 MHz are needed")
    frames = frames[: len(frames) // (width * channels) * width * channels]
    if not frames:
        raise ValueError(f"{path} holds no samples")
    return resample(_from_pcm(frames, width).reshape(-1, channels).mean(axis=1, dtype=np.float32), rate)


def _from_pcm(frames: bytes, width: int) -> Array:
    if width == 1:  # the only width whose integers are unsigned
        return np.asarray((np.frombuffer(frames, dtype=np.uint8).astype(np.float32) - 128) / 128)
    # The bytes become the upper bytes of an int32.
    wide = np.zeros((len(frames) // width, 4), dtype=np.uint8)
    wide[:, 4 - width :] = np.frombuffer(frames, dtype=np.uint8).reshape(-1, width)
    return np.asarray(wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31))


def resample(samples: Array, rate: int) -> Array:
    """Return samples at 16 kHz instead of `rate`; samples at 16 kHz are returned unchanged.

    A low-pass filter computes the values at the new times. Each value is the sum of the samples around it, weighted
    with a sinc that passes the frequencies that both rates can hold, under a Hann window over 32 zero crossings on each
    side.
    """
    common = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, rate // common
    if up == down:
        return samples
    cutoff = 0.95 * min(1, up / down)  # as a share of the highest frequency that `rate` can hold
    reach = math.ceil(CROSSINGS / cutoff)
    padded = np.pad(samples, reach)
    windows = WINDOWS(padded, 2 * reach + 1)[: len(samples)]
    out = np.empty(-(-len(samples) * up // down), dtype=np.float32)
    for phase in range(min(up, len(out))):  # every up-th value is equally far from a sample and has equal weights
        first, part = divmod(phase * down, up)
        distance = part / up - np.arange(-reach, reach + 1)
        weights = np.sinc(cutoff * distance) * np.cos(np.pi / 2 * np.clip(cutoff * distance / CROSSINGS, -1, 1)) ** 2
        out[phase::up] = windows[first::down] @ (weights / weights.sum()).astype(np.float32)
    return out


def clips(samples: Array) -> Iterator[Array]:
    """Yield consecutive parts of at most 30 s. Each part but the last is cut where its last 5 s are quietest."""
    while len(samples) > CLIP:
        tail = samples[CLIP - 5 * SAMPLE_RATE : CLIP].reshape(-1, SAMPLE_RATE // 20)
        cut = CLIP - 5 * SAMPLE_RATE + int(np.argmin(np.square(tail).mean(axis=1))) * tail.shape[1]
        cut += tail.shape[1] // 2
        yield samples[:cut]
        samples = samples[cut:]
    yield samples


def silent(samples: Array) -> bool:
    """Return whether the samples are silent; Whisper would make up words."""
    return bool(np.max(np.abs(samples), initial=0) < QUIET)


def log_mel(samples: Array) -> Array:
    """Return the encoder's input: the loudness of 80 bands every 10 ms, (3000, 80).

    `samples` are at most 30 s at 16 kHz, from -1 to 1; silence is added at the end.
    """
    clip = np.zeros(CLIP)
    clip[: len(samples)] = samples
    padded = np.pad(clip, FRAME // 2, mode="reflect")
    frames = WINDOWS(padded, FRAME)[::HOP][: CLIP // HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    loudness = np.log10(np.maximum(power @ mel_filters().T, 1e-10))
    return np.asarray((np.maximum(loudness, loudness.max() - 8) + 4) / 4, dtype=np.float32)


def mel_filters() -> Array:
    """Return a triangle over the frequencies for each band, (80, 201); all have the same area (as Slaney's)."""
    # Bands lie at equal distances on a scale that is linear up to 1 kHz (15 mels), then logarithmic.
    mels = np.linspace(0, 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4), BANDS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    left, middle, right = (edges[i : i + BANDS, None] for i in range(3))
    frequencies = np.arange(FRAME // 2 + 1) * SAMPLE_RATE / FRAME
    rising, falling = (frequencies - left) / (middle - left), (right - frequencies) / (right - middle)
    return np.asarray(np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left))
