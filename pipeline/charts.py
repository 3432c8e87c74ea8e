"""Small charts as inline SVG: no scripts, colours from the page, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 70, 10, 40


def curve(lines: Mapping[str, Points], references: Mapping[str, float], x_name: str, y_name: str) -> str:
    """Lines over a common axis (CSS classes are their names) with dashed horizontal references; first line last drawn.

    The y axis is cut above the 98th percentile, so that the first steps do not flatten the rest.
    """
    values = sorted(y for points in lines.values() for _, y in points)
    top = max([values[min(len(values) - 1, int(0.98 * len(values)))], *references.values()]) if values else 1.0
    ticks = nice_ticks(min([*values[:1], *references.values()]), top)
    span = max((x for points in lines.values() for x, _ in points), default=1.0) or 1.0
    x_ticks = [tick for tick in nice_ticks(0, span) if tick <= span * 1.02]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / span
        share = (min(y, ticks[-1]) - ticks[0]) / (ticks[-1] - ticks[0])
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    body = [_rule(place(0, tick), place(span, tick), "axis", f"{tick:g}") for tick in ticks]
    body += [_text(*place(tick, ticks[0]), _short(tick), "middle", 19) for tick in x_ticks]
    body += [_reference(name, place(0, y), place(span, y)) for name, y in references.items()]
    for name, points in lines.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        body.append(f'<polyline class="{name}" points="{path}"/>')
    body.append(_text(WIDTH - RIGHT, HEIGHT - BOTTOM, x_name, "end", 36))
    return _svg(body, f"{y_name} over {x_name}")


def histogram(values: Sequence[float], marker: float, name: str, bins: int = 28) -> str:
    """Columns of counts between the extremes, with a line at `marker`."""
    low, high = min(values), max(values)
    step = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / step))] += 1
    tall, wide = HEIGHT - TOP - BOTTOM, (WIDTH - 2 * LEFT) / bins
    body = []
    for index, count in enumerate(counts):
        height = tall * count / max(counts)
        corner = f'x="{LEFT + index * wide + 1:.1f}" y="{HEIGHT - BOTTOM - height:.1f}"'
        body.append(f'<rect class="column" {corner} width="{wide - 2:.1f}" height="{height:.1f}" rx="2"/>')
    base, across = HEIGHT - BOTTOM, (WIDTH - 2 * LEFT) / (step * bins)
    body.append(f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - LEFT}" y2="{base}"/>')
    ticks = [tick for tick in nice_ticks(low, high) if low <= tick <= high]
    body += [_text(LEFT + (tick - low) * across, base, f"{tick:g}", "middle", 19) for tick in ticks]
    x = LEFT + (marker - low) * across
    body.append(f'<line class="mark" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{base}"/>')
    body.append(_text(WIDTH - LEFT, base, name, "end", 36))
    return _svg(body, name)


def columns(counts: Sequence[int], width: int = 220, height: int = 44) -> str:
    """Counts of equal bins as columns, small, with a line at what an equal share would be."""
    tall, wide = 2 * sum(counts) / max(len(counts), 1), width / max(len(counts), 1)
    body = []
    for index, count in enumerate(counts):
        high = min(height, height * count / max(tall, 1))
        corner = f'x="{index * wide + 0.5:.1f}" y="{height - high:.1f}"'
        body.append(f'<rect class="column" {corner} width="{wide - 1:.1f}" height="{high:.1f}"/>')
    body.append(f'<line class="mark" x1="0" y1="{height / 2}" x2="{width}" y2="{height / 2}"/>')
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img" aria-label="histogram">{"".join(body)}</svg>'


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose [low, high]."""
    raw = max(high - low, 1e-6) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def _svg(body: Sequence[str], title: str) -> str:
    inner = "".join(body)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{inner}</svg>'


def _rule(start: tuple[float, float], end: tuple[float, float], kind: str, name: str) -> str:
    line = f'<line class="{kind}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
    return line + _text(start[0] - 8, start[1], name, "end", 4)


def _reference(name: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    line = f'<line class="ref" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
    return line + _text(end[0] + 6, end[1], name, "start", 4)


def _text(x: float, y: float, text: str, anchor: str, drop: float) -> str:
    return f'<text x="{x:.1f}" y="{y + drop:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
