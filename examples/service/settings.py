"""The service's sizes and models, shared with the load tool, which computes the answers again."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from decoder import Config, Decoder, random_weights
from minilm import MiniLM

from service.engine import Engine


@dataclass(frozen=True)
class Settings:
    """Sizes; SERVICE_PAGES=64 in the environment sets `pages`, and so on."""

    pages: int = 1024
    max_batch: int = 16
    max_waiting: int = 64
    step_tokens: int = 2048  # most tokens embedded between two steps of generation
    read_seconds: int = 10  # time for a request's body to arrive

    @staticmethod
    def from_environment() -> Settings:
        names = {f.name: f"SERVICE_{f.name.upper()}" for f in fields(Settings)}
        return Settings(**{name: int(os.environ[key]) for name, key in names.items() if key in os.environ})


def make_engine(settings: Settings) -> Engine:
    """Return the engine with the decoder of generate.py."""
    config = Config(kv_heads=2)
    return Engine(
        Decoder(config, random_weights(config)),
        num_pages=settings.pages,
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
    )


def make_embedder() -> MiniLM:
    """Return the model that embeds; ImportError says what to install for it."""
    return MiniLM()
