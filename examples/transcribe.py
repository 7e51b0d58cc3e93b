"""Transcribes a WAV file (English), with Whisper tiny.en on selfattn and NumPy.

The text is written to standard output while it is recognised; the speed is written to standard error.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nn import Array
from sound import SAMPLE_RATE, clips, log_mel, read_wav, silent
from whisper import Whisper


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    try:
        samples = read_wav(args.file) if args.say is None else say(args.say)
        model = Whisper()
    except (ImportError, OSError, ValueError) as error:
        print(f"transcribe.py: {error}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    first = True
    for text in transcribe(model, samples):
        print(text.lstrip() if first else text, end="", flush=True)
        first = first and not text.strip()
    seconds, length = time.perf_counter() - start, len(samples) / SAMPLE_RATE
    print(flush=True)
    print(f"{length:.1f} s of sound in {seconds:.2f} s: {length / seconds:.1f} s per second", file=sys.stderr)
    return 0


def transcribe(model: Whisper, samples: Array) -> Iterator[str]:
    """Yield the text of samples at 16 kHz, a piece for each token, clip by clip."""
    for clip in clips(samples):
        if not silent(clip):
            yield from model.text(model.tokens(model.encoder(log_mel(clip))))


def say(text: str) -> Array:
    """Return espeak-ng's speech for a text, at 16 kHz."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise ImportError("espeak-ng is missing, which --say needs: apt-get install espeak-ng, or give a WAV file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = [program, "-v", "en-us", "-s", "150", "-w", str(path), "--stdin"]
        if subprocess.run(command, input=text.encode(), check=False).returncode or not path.exists():
            raise ValueError(f"espeak-ng did not speak {text!r}")
        return read_wav(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=Path, help="a WAV file: PCM, any rate, any number of channels")
    source.add_argument("--say", metavar="TEXT", help="let espeak-ng speak this text instead")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
