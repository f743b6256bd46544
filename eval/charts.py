"""Charts as SVG that follows the colours of the page around it.

Colours are CSS variables (--c0 ... --c5, --ink, --muted, --grid, --band), so one file serves a light and
a dark page; every series also has a marker of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["COLOURS", "Interval", "Point", "Series", "forest", "legend", "lines"]

COLOURS = 6
_MARKERS: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>',
    lambda x, y: f'<rect x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 4.4:.1f}l4.2 7.6h-8.4z"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 4.8:.1f}l4.8 4.8-4.8 4.8-4.8-4.8z"/>',
    lambda x, y: f'<path d="M{x:.1f} {y + 4.4:.1f}l4.2-7.6h-8.4z"/>',
    lambda x, y: f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8" fill="none" stroke-width="2"/>',
)


@dataclass(frozen=True)
class Point:
    """A value at x with an interval (low, high), named in the tooltip."""

    x: float
    y: float
    low: float
    high: float
    name: str


@dataclass(frozen=True)
class Series:
    """Points that belong together; `index` picks colour and marker, -1 the colour of text."""

    name: str
    index: int
    points: list[Point]


@dataclass(frozen=True)
class Interval:
    """A row of a forest plot; `verdict` is a CSS class."""

    name: str
    value: float
    low: float
    high: float
    verdict: str


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
    x_ticks: Callable[[float], str] = "{:g}".format,
    y_ticks: Callable[[float], str] = "{:g}".format,
    y_limits: tuple[float, float] = (-math.inf, math.inf),
    log_y: bool = False,
    round_x: bool = False,
    joined: bool = True,
    width: int = 340,
    height: int = 250,
) -> str:
    """Series over a logarithmic x axis, with intervals and a dashed line of reference.

    Args:
        title: above the chart.
        series: points with x above 0 (and y, if `log_y`).
        x_label, y_label: of the axes.
        reference: name and y of a dashed line.
        x_ticks, y_ticks: how tick values are written.
        y_limits: ends that the axis and the intervals do not pass, unless `log_y`.
        log_y: whether y is logarithmic too.
        round_x: ticks of x at round values, not at those of the points.
        joined: whether a line goes through a series.
        width, height: in CSS pixels; the chart shrinks with its column.
    """
    left, right, top, bottom = 60, 12, 30, 42
    points = [point for one in series for point in one.points]
    xs = [point.x for point in points]
    ys = [y for p in points for y in (p.y, p.low, p.high)] + ([reference[1]] if reference else [])
    if log_y:
        floor = min(p.y for p in points) / 3
        ys = [max(y, floor) for y in ys]
    x_low, x_high = math.log2(min(xs)), math.log2(max(xs))
    x_low, x_high = x_low - 0.3, x_high + 0.3
    to = math.log10 if log_y else float
    y_low, y_high = to(min(ys)), to(max(ys))
    pad = 0.08 * (y_high - y_low) or 0.05
    lowest, highest = (-math.inf, math.inf) if log_y else y_limits
    y_low, y_high = max(y_low - pad, lowest), min(y_high + pad, highest)
    y_low, y_high = (y_low, y_high) if y_low < y_high else (y_low - 0.05, y_high + 0.05)

    def place_x(x: float) -> float:
        return left + (math.log2(x) - x_low) / (x_high - x_low) * (width - left - right)

    def place_y(y: float) -> float:
        y = min(max(y, floor if log_y else lowest), highest)
        share = (to(y) - y_low) / (y_high - y_low)
        return height - bottom - share * (height - top - bottom)

    out = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        _text("title", 8, 16, title, "start"),
    ]
    for value in _log_ticks(y_low, y_high) if log_y else _ticks(y_low, y_high):
        y = place_y(value)
        out.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        out.append(_text("tick", left - 6, y + 3.5, y_ticks(value), "end"))
    end = -math.inf  # of the last label, at 6 pixels a character
    for value in _round_values(2**x_low, 2**x_high) if round_x else sorted(set(xs)):
        x = place_x(value)
        half = 3 * len(x_ticks(value))
        if x - half < end + 8:
            continue
        end = x + half
        out.append(f'<path class="grid" d="M{x:.1f} {height - bottom}v4"/>')
        out.append(_text("tick", x, height - bottom + 16, x_ticks(value)))
    out.append(_text("axis", (left + width - right) / 2, height - 6, x_label))
    middle = (top + height - bottom) / 2
    out.append(
        f'<text class="axis" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    if reference:
        y = place_y(reference[1])
        out.append(
            f'<path class="reference" d="M{left} {y:.1f}H{width - right}">'
            f"<title>{escape(reference[0])}: {y_ticks(reference[1])}</title></path>"
        )
    for one in series:
        ordered = sorted(one.points, key=lambda point: point.x)
        path = " ".join(f"{place_x(p.x):.1f},{place_y(p.y):.1f}" for p in ordered)
        colour = _colour(one.index)
        out.append(f'<g stroke="{colour}" fill="{colour}">')
        if joined:
            out.append(f'<polyline points="{path}" fill="none" stroke-width="1.6"/>')
        for point in ordered:
            x = place_x(point.x)
            out.append(
                f"<g><title>{escape(point.name)}: {y_ticks(point.y)} "
                f"[{y_ticks(point.low)}, {y_ticks(point.high)}]</title>"
                f'<path d="M{x:.1f} {place_y(point.low):.1f}V{place_y(point.high):.1f}" opacity=".6"/>'
                f"{_MARKERS[one.index % len(_MARKERS)](x, place_y(point.y))}</g>"
            )
        out.append("</g>")
    out.append("</svg>")
    return "".join(out)


def forest(
    title: str,
    rows: Sequence[Interval],
    *,
    margin: float,
    x_label: str,
    span: tuple[float, float] | None = None,
    width: int = 520,
) -> str:
    """Intervals under one another, with zero and the margin of non-inferiority marked.

    Args:
        title: above the chart.
        rows: from top to bottom.
        margin: above 0; shaded is what lies right of its negative.
        x_label: of the axis.
        span: what the axis shows at least, for charts that are to share it.
        width: in CSS pixels; the chart shrinks with its column.
    """
    left, right, top, bottom, step = 150, 16, 30, 38, 20
    height = top + step * len(rows) + bottom
    low = min([-1.3 * margin, *(row.low for row in rows), *(span or ())])
    high = max([0.3 * margin, *(row.high for row in rows), *(span or ())])
    pad = 0.04 * (high - low)
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    foot = height - bottom
    out = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        _text("title", 8, 16, title, "start"),
        f'<rect class="band" x="{place(-margin):.1f}" y="{top - 6}" '
        f'width="{width - right - place(-margin):.1f}" height="{foot - top + 8}"/>',
    ]
    for value in _ticks(low, high):
        x = place(value)
        out.append(f'<path class="grid" d="M{x:.1f} {top - 6}V{foot + 2}"/>')
        out.append(_text("tick", x, foot + 16, f"{value:+g}" if value else "0"))
    out.append(f'<path class="zero" d="M{place(0):.1f} {top - 6}V{foot + 2}"/>')
    out.append(f'<path class="reference" d="M{place(-margin):.1f} {top - 6}V{foot + 2}"/>')
    out.append(_text("axis", (left + width - right) / 2, height - 5, x_label))
    for i, row in enumerate(rows):
        y = top + step * (i + 0.5)
        out.append(
            _text("tick", left - 10, y + 4, row.name, "end")
            + f'<g class="{escape(row.verdict)}"><title>{escape(row.name)}: {row.value:+.2f} '
            f"[{row.low:+.2f}, {row.high:+.2f}], {escape(row.verdict)}</title>"
            f'<path class="bar" d="M{place(row.low):.1f} {y:.1f}H{place(row.high):.1f}"/>'
            f"{_MARKERS[0](place(row.value), y)}</g>"
        )
    out.append("</svg>")
    return "".join(out)


def legend(series: Sequence[tuple[str, int]], reference: str | None = None) -> str:
    """Names of series, and of the dashed line, for several charts at once."""
    items = []
    for name, index in series:
        colour = _colour(index)
        items.append(
            f'<span><svg viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">'
            f'<g stroke="{colour}" fill="{colour}"><path d="M1 6H25" stroke-width="1.6"/>'
            f"{_MARKERS[index % len(_MARKERS)](13, 6)}</g></svg>{escape(name)}</span>"
        )
    if reference:
        items.append(
            '<span><svg viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">'
            f'<path class="reference" d="M1 6H25"/></svg>{escape(reference)}</span>'
        )
    return f'<p class="legend">{"".join(items)}</p>'


def _colour(index: int) -> str:
    return "var(--ink)" if index < 0 else f"var(--c{index % COLOURS})"


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _round_values(low: float, high: float) -> list[float]:
    """Round numbers between low and high for a logarithmic axis: 1, 2, 5, or finer if those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 2, 3, 4, 5, 6, 8)):
        found = [float(f"{m}e{i}") for i in powers for m in steps if low <= m * 10.0**i <= high]
        if len(found) >= 3:
            return found
    return _ticks(low, high)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between exponents; more of them where there are few."""
    whole = [10.0**i for i in range(math.ceil(low), math.floor(high) + 1)]
    if len(whole) >= 3:
        return whole
    first = math.floor(low)
    fine = [m * 10.0**i for i in range(first, math.ceil(high) + 1) for m in (1, 2, 5)]
    return [value for value in fine if low <= math.log10(value) <= high]
