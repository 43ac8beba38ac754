"""plot_alignment: the weights of an attention as a heat map, with matplotlib (the extra `plot`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

_CELL, _LEAST, _MOST = 0.35, 3.0, 16.0  # inches: of a token, and of a side of the figure


def plot_alignment(
    weights: Tensor,
    source: Sequence[str] | None = None,
    target: Sequence[str] | None = None,
    ax: Any = None,
) -> Any:
    """Draw attention weights, a row for each query and a column for each key: arXiv 1409.0473, figure 3.

    Tokens in a script that matplotlib's font lacks, such as Chinese, are drawn with an installed font that
    has their characters; where there is none a warning says which to install.

    Args:
        weights: ``[Tq, Tk]``, or with leading dimensions of size 1; on any device, of any floating dtype.
        source: the tokens of the keys, Tk of them.
        target: the tokens of the queries, Tq of them.
        ax: a matplotlib Axes to draw into; without one a figure is made, with a colour bar.

    Returns:
        The Axes. ``ax.figure.savefig("alignment.png")`` writes it to a file.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``weights`` is not a tensor.
        ValueError: ``weights`` is more than one matrix or an empty one, or tokens are not as many as it has
            rows or columns.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot_alignment needs matplotlib: install the extra plot, pip install 'fusedrnn[plot]'"
        ) from error
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a tensor, got {type(weights).__name__}")
    shape = list(weights.shape)
    if len(shape) < 2 or any(n != 1 for n in shape[:-2]) or 0 in shape:
        raise ValueError(
            f"weights: expected shape [Tq, Tk], or with leading dimensions of size 1, got {shape}"
        )
    queries, keys = shape[-2:]
    for name, tokens, size in (("source", source, keys), ("target", target, queries)):
        if tokens is not None and len(tokens) != size:
            what = "Tk" if name == "source" else "Tq"
            raise ValueError(f"{name}: expected {size} tokens, {what} of weights {shape}, got {len(tokens)}")

    own = ax is None
    if own:
        sides = (min(max(_CELL * n + 1.5, _LEAST), _MOST) for n in (keys, queries))
        _, ax = pyplot.subplots(figsize=tuple(sides), layout="constrained")
    matrix = weights.detach().double().cpu().reshape(queries, keys).numpy()
    image = ax.imshow(matrix, vmin=0.0, cmap="viridis", aspect="auto", interpolation="nearest")
    # a token may hold dollar signs, which are no formula
    style = {"family": _families([*(source or ()), *(target or ())]), "parse_math": False}
    ax.xaxis.tick_top()
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if source is not None:
        turned = 90 if max(map(len, source)) > 2 else 0
        ax.set_xticks(range(keys), source, rotation=turned, **style)
    if target is not None:
        ax.set_yticks(range(queries), target, **style)
    if own:
        ax.figure.colorbar(image, ax=ax)
    return ax


def _families(tokens: Sequence[str]) -> list[str]:
    """matplotlib's own fonts, and behind them one that has the characters which they lack."""
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    default = font_manager.findfont(font_manager.FontProperties(family=families))
    lacking = {ord(c) for token in tokens for c in token if c.isprintable()} - _characters(default)
    if not lacking:
        return families
    # of fonts that have equally many the first by name, so that a picture does not depend on their order
    fonts = sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name, font.fname))
    # Unicode's font of placeholders, which matplotlib brings, claims every character
    fonts = [font for font in fonts if not font.name.startswith("Last Resort")]
    best = max(fonts, key=lambda font: len(lacking & _characters(font.fname)))
    left = lacking - _characters(best.fname)
    if left:
        shown = "".join(map(chr, sorted(left)[:8]))
        warnings.warn(
            f"plot_alignment: no installed font has {shown!r}; install one and start Python again, for "
            "Chinese, Japanese and Korean Noto Sans CJK (Debian, Ubuntu: apt install fonts-noto-cjk)",
            stacklevel=3,
        )
    return [*families, best.name]


@cache
def _characters(path: str) -> frozenset[int]:
    """The code points that a font file has glyphs for; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
