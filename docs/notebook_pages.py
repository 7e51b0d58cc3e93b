"""A Sphinx extension: notebooks become pages, with the outputs that they were saved with."""

from __future__ import annotations

import json
from typing import Any

from docutils import nodes
from myst_parser.sphinx_ import Parser
from sphinx.application import Sphinx


def page_of(notebook: dict[str, Any]) -> str:
    """Return the notebook as a page in Markdown."""
    return "\n\n".join(part for cell in notebook["cells"] for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    shown = [_shown(output) for output in cell["outputs"]]
    return [_block("python", source), *shown]


def _shown(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return _block("text", "".join(output["text"]))
    data = output["data"]
    if "image/png" in data:
        return f"![{''.join(data['text/plain'])}](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return _block("text", "".join(data["text/plain"]))


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


class NotebookParser(Parser):  # type: ignore[misc]
    """The parser of .ipynb files."""

    supported = ("ipynb",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        super().parse(page_of(json.loads(inputstring)), document)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(NotebookParser)
    return {"version": "1", "parallel_read_safe": True}
