"""Figures without a display: on Agg's canvas and in matplotlib's default style; the width of their text.

Neither MPLBACKEND nor a matplotlibrc file has an effect, because other modules import matplotlib from here.
"""

import contextlib
import logging
import os
import re
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache


def _import_matplotlib() -> None:
    """Import matplotlib, which raises if MPLBACKEND names a backend that is not installed.

    Child processes of a notebook inherit its MPLBACKEND. Where that is valid, it stays the backend of other figures.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


_import_matplotlib()

from matplotlib import style  # noqa: E402
from matplotlib.axes import Axes as Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure as Figure  # noqa: E402
from matplotlib.font_manager import FontProperties  # noqa: E402
from matplotlib.textpath import text_to_path  # noqa: E402
from matplotlib.ticker import MaxNLocator as MaxNLocator  # noqa: E402
from matplotlib.ticker import PercentFormatter as PercentFormatter  # noqa: E402

DPI = 110
# Before matplotlib 3.11, there is a second warning for scripts that it does not lay out.
MISSING_GLYPH = r"Glyph \d+ .* missing from|Matplotlib currently does not support"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Draw in matplotlib's default style, as a decorator. Dollar signs in names of classes and files start no formula.

    Characters that the font lacks are drawn as boxes; matplotlib's warnings of each of them become one log line.
    """
    with style.context(["default", {"text.parse_math": False}]), warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=MISSING_GLYPH)
        yield
    for warning in caught:
        if re.match(MISSING_GLYPH, str(warning.message)):
            log_missing_glyphs()
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@lru_cache
def log_missing_glyphs() -> None:
    """Log once that names are not readable in figures."""
    logger.warning(
        "figures: the font lacks characters of some names, which are drawn as boxes; files contain the names"
    )


def create_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches."""
    # Figure without pyplot: no display, no global state, nothing to close.
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def create_axes(title: str, xlabel: str, size: tuple[float, float] = (7, 4.5)) -> tuple[Figure, Axes]:
    """Return a figure of a size in inches, and its only axes."""
    figure = create_figure(size)
    axes = figure.add_subplot(title=title, xlabel=xlabel)
    axes.grid(alpha=0.3)
    return figure, axes


def text_width(text: str, font_size: float) -> float:
    """Return the width of a line of text in inches; `font_size` is in points."""
    font = FontProperties(size=font_size)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def shorten(text: str, font_size: float, width: float) -> str:
    """Return a text with "…" for its middle, if it is wider than `width` inches: both ends may distinguish names."""

    def cut(length: int) -> str:
        return f"{text[: (length + 1) // 2]}…{text[len(text) - length // 2 :]}"

    measure: Callable[[int], float] = lambda length: text_width(cut(length), font_size)  # noqa: E731
    if text_width(text, font_size) <= width:
        return text
    return cut(max(0, bisect_right(range(len(text)), width, key=measure) - 1))
