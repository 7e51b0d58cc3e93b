"""Pictures of attention weights: a heatmap (matplotlib, extra ``[viz]``), lines between tokens (SVG), and text.

Keys are along x, queries along y, row 0 at the top. Attention weights show where information may flow; they do not
explain what a model does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from numpy.typing import ArrayLike

from . import _heatmap, _terminal
from ._arguments import flag, whole_number
from ._head_view import HeadView as HeadView
from ._head_view import view
from ._keywords import hinted
from ._mask_nodes import Mask
from ._picture import ignoring_overflow, read, read_style, without

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@hinted
@ignoring_overflow
def heatmap(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    ax: Axes | None = None,
    head: int | Literal["mean"] | None = None,
    title: str | None = None,
    log: bool = False,
    mask: ArrayLike | Mask | None = None,
    vmax: float | None = None,
    power: float | None = None,
    skip: Sequence[str] | None = None,
    values: bool = False,
) -> Axes:
    """Draw attention weights as a heatmap.

    Parameters
    ----------
    weights : array_like, shape (Sq, Sk) or (H, Sq, Sk)
        As returned by ``attention(..., return_weights=True)`` for one batch entry.
    tokens : sequence of str, optional
        Names of the queries; also of the keys if `key_tokens` is not given and there are as many keys as queries.
    key_tokens : sequence of str, optional
        Names of the keys.
    ax : matplotlib Axes, optional
        Axes to draw on; by default, a new figure is made.
    head : int or "mean", optional
        The head of (H, Sq, Sk) to draw; "mean" averages the heads. Required if there is more than one head.
    title : str, optional
    log : bool, default False
        Use a logarithmic colour scale, from 1e-4.
    mask : array_like of bool or masks.Mask, optional
        True = attend, (Sq, Sk) or broadcastable to it; an expression has the offset Sk − Sq. Hidden pairs are drawn
        grey and hatched, to tell them from a weight of 0.
    vmax : float, optional
        Weight of the brightest colour, for a common scale in several pictures. Default: the largest weight.
    power : float, optional
        The brightness is (weight / `vmax`) to this power. With 0.5, small weights differ more. Not together with `log`.
    skip : sequence of str, optional
        Names of tokens to leave out, as queries and as keys, such as ``["[CLS]", "[SEP]"]``. These marks often have so
        much weight that all other cells are dark. The other weights are drawn unchanged; the title says which part of
        the weight is left out.
    values : bool, default False
        Write each weight into its cell, with two decimals. At most 64 tokens along an axis.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        matplotlib is missing.
    TypeError, ValueError
        Arguments that do not fit; the message names the argument and its value.

    Notes
    -----
    Tokens and title are shown literally: a ``$`` does not start a formula, and invisible characters, such as a newline,
    appear as escapes (``\\n``). Tokens are cut to 20 columns. NaN and infinite weights are red. Above 512 tokens along
    an axis, adjacent tokens are grouped, and each group shows its largest weight. The title says if weights are not
    finite or grouped.

    Examples
    --------
    >>> from selfattn import viz
    >>> ax = viz.heatmap([[1.0, 0.0], [0.25, 0.75]], ["to", "Norway"])
    >>> ax.figure.savefig("weights.png")
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('viz.heatmap needs matplotlib: pip install "selfattn[viz]"')
    picture = without("heatmap", read("heatmap", weights, head, tokens, key_tokens, mask), skip)
    style = read_style("heatmap", title, log, vmax, power)
    return _heatmap.drawn(picture, style, ax, flag("heatmap", "values", values))


@hinted
@ignoring_overflow
def text(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    head: int | Literal["mean"] | None = None,
    width: int = 100,
    title: str | None = None,
    log: bool = False,
    mask: ArrayLike | Mask | None = None,
    vmax: float | None = None,
    power: float | None = None,
    skip: Sequence[str] | None = None,
) -> str:
    """Draw attention weights with block characters, for a terminal.

    Parameters
    ----------
    weights, tokens, key_tokens, head
        As for `heatmap`.
    width : int, default 100
        Columns of the terminal. If there are more keys, adjacent ones are grouped, showing each group's largest weight.
    title : str, optional
        Replaces "attention weights" at the start of the headline.
    log, mask, vmax, power, skip
        As for `heatmap`. Hidden pairs are drawn as ``·``. The share of the first token, the sums and the entropies also
        count the keys that are left out.

    Returns
    -------
    str
        A headline (shape, dtype, head, share of the first token, largest deviation of a row's sum from 1), then a line
        per query: its name, its weights relative to the largest one, and its entropy in bits. Weights that are NaN or
        infinite are drawn as ``!``, and the headline counts them.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names the argument and its value.

    Notes
    -----
    Tokens cannot control the terminal: invisible characters, such as a newline or an escape, appear as escapes
    (``\\n``, ``\\x1b``). Names are cut to 20 columns, and aligned by their width in a terminal.

    Examples
    --------
    >>> from selfattn import viz
    >>> print(viz.text([[1.0, 0.0], [0.25, 0.75]], ["to", "Norway"], title="weights"))
    weights 2 × 2, float64; first token 62 %, row sums within 0.0e+00 of 1
        to │█ │  0.0 bit
    Norway │░▓│  0.8 bit
    """
    picture = without("text", read("text", weights, head, tokens, key_tokens, mask), skip)
    style = read_style("text", title, log, vmax, power)
    return _terminal.drawn(picture, style, whole_number("text", "width", width, 1))


@hinted
@ignoring_overflow
def head_view(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    head: int | Literal["mean"] | None = None,
    title: str | None = None,
    mask: ArrayLike | Mask | None = None,
    skip: Sequence[str] | None = None,
    least: float = 0.05,
) -> HeadView:
    """Draw attention weights as lines from queries (left) to keys (right), a panel for each head, as SVG.

    Parameters
    ----------
    weights, tokens, key_tokens, title, skip
        As for `heatmap`. At most 128 tokens and 32 heads.
    head : int or "mean", optional
        The only head to draw; "mean" averages the heads. By default, all heads are drawn.
    mask : array_like of bool or masks.Mask, optional
        True = attend, (Sq, Sk) or broadcastable to it; an expression has the offset Sk − Sq. Hidden pairs have no line.
    least : float, default 0.05
        Smaller weights have no line.

    Returns
    -------
    HeadView
        Shows itself in Jupyter; ``save`` writes it to a file.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names the argument and its value.

    Notes
    -----
    The larger a weight, the wider and darker its line. All panels have the same scale, which the legend shows. NaN and
    infinite weights are dashed lines in another colour. In a browser, the lines of the query under the mouse stand out,
    and each line shows its weight. There are no scripts, and nothing is loaded from elsewhere. Tokens and title are
    escaped.

    Examples
    --------
    >>> from selfattn import viz
    >>> view = viz.head_view([[1.0, 0.0], [0.25, 0.75]], ["to", "Norway"])
    >>> view
    <HeadView: 1 head, 2 queries, 2 keys>
    >>> view.save("weights.html")
    """
    return view(weights, head, (tokens, key_tokens), mask, (title, skip, least))
