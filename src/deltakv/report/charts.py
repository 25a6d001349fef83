"""Charts as inline SVG: they take the page's colours, dark or light, and need nothing else.

A chart is drawn 360 units wide, the width of a phone, so that its letters are as large as the page's there; a wider
screen shows several side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
#: Marks that are told apart without colour too.
SHAPES = ("circle", "square", "triangle", "diamond")
COLOURS = 8
CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
    "triangle": [(0, -5), (5, 4), (-5, 4)],
    "diamond": [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)],
}


@dataclass(frozen=True)
class Point:
    """series: what it belongs to. low, high: the ends of its interval on the y axis. label: beside the mark."""

    x: float
    y: float
    series: str
    label: str = ""
    low: float | None = None
    high: float | None = None
    says: str = ""


@dataclass(frozen=True)
class Axis:
    """name: with its unit. log: logarithmic. form: how a value is written. zero: the axis begins there."""

    name: str
    form: str = "{:,.0f}"
    log: bool = False
    zero: bool = False


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool
    start: float
    stop: float

    def at(self, value: float) -> float:
        low, high, value = (math.log(max(x, 1e-12)) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def chart(
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    style: dict[str, int],
    *,
    lines: bool = False,
    frontier: str | None = None,
) -> str:
    """An `<svg>`. style: a number for each series, its colour (grey: 0 and less) and shape.

    lines: join the points of a series.
    frontier: "up" or "down" joins the points that none to their left beats, more or less being better.
    """
    across = _scale([point.x for point in points], x, _LEFT, WIDTH - _RIGHT)
    ends = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    upright = _scale(ends, y, HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(across, x, upright, y)]
    if frontier is not None:
        places = [(across.at(point.x), upright.at(point.y)) for point in _best(points, frontier)]
        parts.append(f'<polyline class="frontier" points="{_pairs(places)}"/>')
    if lines:
        for series in dict.fromkeys(point.series for point in points):
            chain = sorted((point.x, point.y) for point in points if point.series == series)
            places = [(across.at(one), upright.at(other)) for one, other in chain]
            parts.append(f'<polyline class="line {_colour(style[series])}" points="{_pairs(places)}"/>')
    marks = [(across.at(point.x), upright.at(point.y)) for point in points]
    labels = _Labels(marks)
    for point, (at, height) in sorted(zip(points, marks, strict=True), key=lambda pair: pair[1]):
        inside = _whisker(point, at, upright, style[point.series]) + _shape(style[point.series], at, height)
        inside += labels.place(point.label, at, height) if point.label else ""
        parts.append(f"<g><title>{escape(point.says or point.series)}</title>{inside}</g>")
    says = f"{escape(y.name)} over {escape(x.name)}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{says}">{"".join(parts)}</svg>'


def mark(number: int) -> str:
    """A series' mark alone, for a legend."""
    return f'<svg class="key" viewBox="0 0 12 12" aria-hidden="true">{_shape(number, 6, 6)}</svg>'


def _scale(values: Sequence[float], axis: Axis, start: float, stop: float) -> _Scale:
    low, high = min(values), max(values)
    if axis.log:
        room = 1.3 if high > 4 * low else 2.2  # wide enough for two ticks
        low, high = low / room, high * room
    else:
        low = 0.0 if axis.zero else low
        room = (high - low or abs(high) or 1.0) * 0.08
        low, high = low if axis.zero else low - room, high + room
    return _Scale(low, high, axis.log, start, stop)


def _ticks(scale: _Scale, most: int) -> list[float]:
    """At most that many round values: 1, 2 or 5 times a power of ten; fewer of these on a long logarithmic axis."""
    if scale.log:
        first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
        for steps in ((1, 2, 5), (1, 3), (1,)):
            ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            ticks = [tick for tick in ticks if scale.low <= tick <= scale.high]
            if len(ticks) <= most:
                return ticks
        return ticks[:: -(-len(ticks) // most)]
    span = scale.high - scale.low
    step = next(
        size * 10.0**power
        for power in range(math.floor(math.log10(span)) - 2, 20)
        for size in (1, 2, 5)
        if span / (size * 10.0**power) <= most
    )
    first = math.ceil(scale.low / step - 1e-9)
    return [number * step for number in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def _grid(across: _Scale, x: Axis, upright: _Scale, y: Axis) -> list[str]:
    parts = []
    for tick in _ticks(upright, 6):
        at = upright.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{y.form.format(tick)}</text>'
        )
    for tick in _ticks(across, 5):
        at = across.at(tick)
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{x.form.format(tick)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.name)}</text>')
    half = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text class="name" transform="translate(10 {half}) rotate(-90)" text-anchor="middle">{escape(y.name)}</text>'
    )
    return parts


def _whisker(point: Point, at: float, upright: _Scale, number: int) -> str:
    if point.low is None or point.high is None:
        return ""
    low, high = upright.at(point.low), upright.at(point.high)
    return f'<line class="whisker {_colour(number)}" x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


class _Labels:
    """Puts labels beside marks where nothing else is; one that finds no room is left out (a touch tells it)."""

    def __init__(self, marks: Sequence[tuple[float, float]]) -> None:
        self._boxes = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]

    def place(self, label: str, x: float, y: float) -> str:
        wide = 6.4 * len(label)
        places = ((x + 7, y + 4), (x - 7 - wide, y + 4), (x - wide / 2, y - 8), (x - wide / 2, y + 16))
        for left, base in places:
            box = (left, base - 9, left + wide, base)
            free = all(
                box[2] < west or east < box[0] or box[3] < north or south < box[1]
                for west, north, east, south in self._boxes
            )
            if free and left > _LEFT and box[2] < WIDTH and base < HEIGHT - _BOTTOM:
                self._boxes.append(box)
                return f'<text class="label" x="{left:.1f}" y="{base:.1f}">{escape(label)}</text>'
        return ""


def _colour(number: int) -> str:
    """Numbers of 0 and less share a colour that no other series has."""
    return f"c{1 + (number - 1) % (COLOURS - 1) if number > 0 else 0}"


def _shape(number: int, x: float, y: float) -> str:
    style = f'class="mark {_colour(number)}"'
    kind = SHAPES[number % len(SHAPES)]  # seven colours and four shapes: 28 series before a pair comes again
    if kind == "circle":
        return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    return f'<polygon {style} points="{_pairs([(x + right, y + down) for right, down in CORNERS[kind]])}"/>'


def _best(points: Sequence[Point], better: str) -> list[Point]:
    """From left to right, each that is better than all before it."""
    sign = 1 if better == "up" else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y)):
        if not best or sign * point.y > sign * best[-1].y:
            best.append(point)
    return best


def _pairs(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
