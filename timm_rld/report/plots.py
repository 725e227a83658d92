"""Plots as SVG that takes its colours from the page, so that light and dark both show them well."""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from .figures import Array
from .page import INSTALL, raw

# What matplotlib draws in this colour, the page draws in that of the style sheet.
_COLOURS = {
    'ink': '#010101', 'soft': '#010102', 'grid': '#010103', 'student': '#010104', 'teacher': '#010105',
    'third': '#010106', 'fourth': '#010107', 'panel': '#010108', 'accent': '#010109',
}  # fmt: skip
SERIES = ('student', 'teacher', 'third', 'fourth')


def require() -> None:
    """Raise UserError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UserError(f'a report needs the package matplotlib; {INSTALL}') from e


def _svg(draw: Callable[[Any], None], width: float, height: float, alt: str) -> Any:
    """Return what ``draw`` draws into a figure, as SVG to be put into a page.

    Args:
        width, height: in inches of 72 points; the page scales it.
        alt: what it shows, for those who do not see it.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    c = _COLOURS
    style = {
        'svg.fonttype': 'none', 'svg.hashsalt': 'timm_rld', 'text.parse_math': False, 'font.size': 9.5,
        'axes.titlesize': 10.5, 'axes.titleweight': 'bold', 'axes.titlelocation': 'left', 'axes.titlepad': 8,
        'axes.edgecolor': c['soft'], 'axes.labelcolor': c['soft'], 'axes.titlecolor': c['ink'], 'text.color': c['ink'],
        'xtick.color': c['soft'], 'ytick.color': c['soft'], 'axes.spines.top': False, 'axes.spines.right': False,
        'axes.linewidth': 0.6, 'xtick.major.width': 0.6, 'ytick.major.width': 0.6, 'xtick.major.size': 3,
        'ytick.major.size': 3, 'axes.grid': True, 'grid.color': c['grid'], 'grid.linewidth': 0.6,
        'axes.axisbelow': True, 'legend.frameon': False, 'legend.fontsize': 9, 'legend.handlelength': 1.4,
        'lines.linewidth': 1.6, 'lines.markersize': 4, 'axes.formatter.useoffset': False, 'path.simplify': True,
    }  # fmt: skip
    with rc_context(style), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.simplefilter('ignore')  # letters that its font lacks: the browser's has them
        figure = Figure(figsize=(width, height), layout='constrained')
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format='svg', transparent=True, metadata={'Date': None, 'Creator': None})
    return raw(_inline(file.getvalue(), alt))


def _inline(svg: str, alt: str) -> str:
    """Return an SVG file as an element of a page: colours of the page, ids of its own, no reference to a host."""
    from markupsafe import escape

    svg = svg[svg.index('<svg') :]
    svg = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->', '', svg, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(alt)}">'
    svg = head + svg[svg.index('>') + 1 :]
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f'var(--{name})')
    own = f'p{hashlib.sha256((alt + svg).encode()).hexdigest()[:8]}-'
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{own}\1"', svg)
    svg = re.sub(r'url\(#([^)]+)\)', rf'url(#{own}\1)', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{own}\1"', svg)
    return re.sub(r'\n\s*', '\n', svg)


def lines(
    title: str,
    epochs: Sequence[float],
    series: Sequence[tuple[str, str, Sequence[float]]],
    *,
    level: tuple[str, float] | None = None,
    unit: str = '',
) -> Any:
    """Return curves over the epochs.

    Args:
        series: name, colour (a name of the style sheet) and values of each.
        level: name and value of a horizontal line.
        unit: of the vertical axis.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        marker = 'o' if len(epochs) < 25 else None
        for name, colour, values in series:
            axes.plot(epochs, values, color=_COLOURS[colour], label=name, marker=marker)
        if level is not None:
            axes.axhline(level[1], color=_COLOURS['soft'], linestyle=(0, (4, 3)), linewidth=1.1, label=level[0])
        axes.set_title(f'{title}, {unit}' if unit else title)
        axes.set_xlabel('epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        values = [v for _, _, of_one in series for v in of_one if math.isfinite(v)]
        if values and max(values) - min(values) <= 0.02 * abs(max(values)):  # else noise fills the height
            axes.set_ylim(min(values) - 0.1 * abs(max(values)), max(values) + 0.1 * abs(max(values)))
        if len(series) > 1 or level is not None:
            axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.2), ncols=3)

    return _svg(draw, 4.3, 3.0, f'{title} over the epochs: {", ".join(name for name, *_ in series)}')


def reliability_diagram(title: str, colour: str, bins: Mapping[str, Array]) -> Any:
    """Return how often a network is right where it is this sure, and how often it is this sure.

    Args:
        bins: of :func:`timm_rld.metrics.reliability`.
    """
    count, confidence, accuracy = bins['count'], bins['confidence'], bins['accuracy']

    def draw(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        edges = np.linspace(0, 1, len(count) + 1)
        some = count > 0
        middle, width = (edges[:-1] + edges[1:])[some] / 2, 0.9 / len(count)
        top.bar(middle, accuracy[some], width, color=_COLOURS[colour], alpha=0.85)
        top.plot([0, 1], [0, 1], color=_COLOURS['soft'], linestyle=(0, (4, 3)), linewidth=1.1)
        top.plot(confidence[some], accuracy[some], 'o', color=_COLOURS['ink'], markersize=3)
        top.set(xlim=(0, 1), ylim=(0, 1), ylabel='share right')
        top.set_title(title)
        bottom.bar(middle, count[some] / count.sum(), width, color=_COLOURS['soft'], alpha=0.6)
        bottom.set(xlabel='probability of the answer', ylabel='images')
        bottom.set_yticks([])
        bottom.grid(False)

    return _svg(draw, 5.4, 4.2, f'reliability diagram. {title}')


def matrix(title: str, counts: Array, names: Sequence[str]) -> Any:
    """Return a confusion matrix: each cell as dark as its share of its row, with its number of images."""
    n = len(names)
    short = [name if len(name) <= 22 else name[:21] + '…' for name in names]

    def draw(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        total = np.maximum(counts.sum(axis=1), 1)
        size = 9 if n <= 12 else 7.5 if n <= 20 else 5.5
        for i, j in zip(*np.nonzero(counts)):
            share = counts[i, j] / total[i]
            colour = _COLOURS['teacher' if i == j else 'student']
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, alpha=0.08 + 0.7 * share))
            axes.text(j, i, str(counts[i, j]), ha='center', va='center', fontsize=size)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect='equal', xlabel='predicted', ylabel='true')
        axes.set_xticks(range(n), short, rotation=90 if max(map(len, short)) > 3 else 0, fontsize=max(size, 7))
        axes.set_yticks(range(n), short, fontsize=max(size, 7))
        axes.tick_params(length=0)
        axes.grid(False)
        axes.set_title(title)

    inches = min(8.5, 3 + 0.3 * n)
    return _svg(draw, inches, inches * 0.95, title)


def stacked_time(epochs: Sequence[float], parts: dict[str, Sequence[float]]) -> Any:
    """Return the seconds of each epoch by part, stacked."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        below = np.zeros(len(epochs))
        colours = {'waiting for images': 'third', 'teacher': 'teacher', 'student': 'student', 'other': 'soft'}
        for part, seconds in parts.items():
            values = np.nan_to_num(np.asarray(seconds, float))
            colour = _COLOURS[colours.get(part, 'fourth')]
            if len(epochs) <= 60:
                axes.bar(epochs, values, 0.8, below, color=colour, label=part, alpha=0.85)
            else:
                axes.fill_between(epochs, below, below + values, color=colour, label=part, alpha=0.85, linewidth=0)
            below = below + values
        axes.set(xlabel='epoch', ylabel='seconds')
        axes.set_title('Seconds of an epoch')
        axes.grid(axis='x', visible=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.2), ncols=4)

    return _svg(draw, 5.4, 2.9, f'seconds of each epoch, by part: {", ".join(parts)}')


def seeds(
    title: str,
    unit: str,
    groups: Sequence[tuple[str, Sequence[float]]],
    intervals: Sequence[tuple[float, float | None]],
    zero: bool = False,
) -> Any:
    """Return a row for each group: its runs as dots, their mean as a bar with its 95% interval.

    Args:
        groups: name and values of each.
        intervals: mean and half the width of the interval of each.
        zero: draw a line at 0.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for row, ((_, values), (mean, half)) in enumerate(zip(groups, intervals)):
            axes.plot(values, [row] * len(values), 'o', color=_COLOURS['accent'], alpha=0.55, markersize=5)
            if half is not None:
                axes.plot([mean - half, mean + half], [row, row], color=_COLOURS['ink'], linewidth=1.2)
            axes.plot([mean, mean], [row - 0.22, row + 0.22], color=_COLOURS['ink'], linewidth=2)
        if zero:
            axes.axvline(0, color=_COLOURS['soft'], linestyle=(0, (4, 3)), linewidth=1.1)
        names = [name if len(name) <= 32 else name[:31] + '…' for name, _ in groups]
        axes.set_yticks(range(len(groups)), names)
        axes.set(ylim=(len(groups) - 0.5, -0.5), xlabel=unit)
        axes.grid(axis='y', visible=False)
        axes.tick_params(axis='y', length=0)
        axes.set_title(title)

    return _svg(draw, 6.5, 1.3 + 0.42 * len(groups), f'{title}: {", ".join(name for name, _ in groups)}')


_MARKERS = 'osD^vPX'


def fractions(
    title: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float, float | None]]]],
    level: tuple[float, float | None] | None = None,
) -> Any:
    """Return top-1 against the poisoned fraction, a line for each criterion.

    Args:
        series: name, and of each point the fraction, the mean and half the width of its 95% interval.
        level: mean, and half width, without distillation: a dashed line.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        colours = [*SERIES, 'accent', 'ink']
        if level is not None:
            axes.axhline(level[0], color=_COLOURS['soft'], linestyle=(0, (4, 3)), linewidth=1.1, label='none')
        for i, (name, points) in enumerate(series):
            colour = _COLOURS[colours[i % len(colours)]]
            x, y = [p[0] for p in points], [p[1] for p in points]
            axes.plot(x, y, color=colour, marker=_MARKERS[i % len(_MARKERS)], label=name,
                      linestyle='-' if i < len(colours) else ':')  # fmt: skip
            for at, mean, half in points:
                if half is not None:
                    axes.plot([at, at], [mean - half, mean + half], color=colour, linewidth=1.0, alpha=0.7)
        axes.set(xlabel='poisoned fraction of the training images', xlim=(-0.03, 1.03))
        axes.set_title(f'{title}: top-1, %')
        axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.2), ncols=4)

    return _svg(draw, 4.3, 3.4, f'{title}: top-1 over the poisoned fraction, {", ".join(name for name, _ in series)}')
