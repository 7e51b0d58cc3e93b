"""The service of examples/service with the encoder of another library, for benchmarks/service.py.

The environment names the library (SERVICE_PEER), its threads (SERVICE_PEER_THREADS, 0: the default) and the exported
model (SERVICE_PEER_ONNX).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from workbench.minilm_peers import import_example, load_model, onnx, padded, pytorch

minilm, settings = import_example("minilm"), import_example("service.settings")
MiniLM: Any = minilm.MiniLM


class PeerMiniLM(MiniLM):  # type: ignore[misc]
    """MiniLM that another library computes, on padded batches."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = None
        threads = int(os.environ.get("SERVICE_PEER_THREADS", "0"))
        if os.environ["SERVICE_PEER"] == "onnxruntime":
            self.run = onnx(Path(os.environ["SERVICE_PEER_ONNX"]), threads)
            return
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.run = pytorch(load_model())

    def embed(self, sentences: list[str]) -> Any:
        """Return the embeddings, (B, 384)."""
        inputs = padded([encoded.ids for encoded in self.tokenizer.encode_batch(sentences)])
        real = inputs["attention_mask"]
        sums = (self.run(inputs) * real[..., None].astype("float32")).sum(axis=1)
        return minilm._pooled(sums, real.sum(axis=1))


if os.environ["SERVICE_PEER"] != "selfattn":
    settings.make_embedder = PeerMiniLM
app = import_example("service.app").app
