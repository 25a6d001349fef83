"""Charts read back: what is drawn is where its numbers say."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from deltakv.report.charts import HEIGHT, SHAPES, WIDTH, Axis, Point, chart

POINTS = [
    Point(10, 0.5, "a", "512", 0.4, 0.6, "a at 512"), Point(20, 0.1, "a", "1024"), Point(30, 0.2, "b", "512"),
    Point(5, 0.9, "b", "256"),
]  # fmt: skip
STYLE = {"a": 1, "b": 4}


def drawn(
    points: list[Point], x: Axis, y: Axis, style: dict[str, int] = STYLE, **options: object
) -> ElementTree.Element:
    return ElementTree.fromstring(chart(points, x, y, style, **options))  # type: ignore[arg-type]


def centre(shape: ElementTree.Element) -> tuple[float, float]:
    if shape.tag == "circle":
        return float(shape.attrib["cx"]), float(shape.attrib["cy"])
    corners = [tuple(map(float, pair.split(","))) for pair in shape.attrib["points"].split()]
    xs, ys = zip(*corners, strict=True)
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


def marks(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [centre(shape) for shape in svg.iter() if shape.attrib.get("class", "").startswith("mark")]


def ticks(svg: ElementTree.Element, anchor: str) -> dict[float, float]:
    """By value, where it stands on its axis."""
    along = "x" if anchor == "middle" else "y"
    found = [t for t in svg.iter("text") if t.attrib["class"] == "tick" and t.attrib["text-anchor"] == anchor]
    return {float(t.text.replace(",", "")): float(t.attrib[along]) - (0 if along == "x" else 3.5) for t in found}


@pytest.mark.parametrize("log", [False, True])
def test_marks_stand_where_the_ticks_say(log: bool) -> None:
    svg = drawn(POINTS, Axis("x", zero=True), Axis("y", "{:g}", log=log))
    across, upright = ticks(svg, "middle"), ticks(svg, "end")
    assert len(across) >= 3 and len(upright) >= 3 and 0 in across
    warp = math.log if log else float

    def at(value: float, scale: dict[float, float], warp: object) -> float:
        (low, start), *_, (high, stop) = sorted(scale.items())
        share = (warp(value) - warp(low)) / (warp(high) - warp(low))  # type: ignore[operator]
        return start + share * (stop - start)

    expected = sorted((at(p.x, across, float), at(p.y, upright, warp)) for p in POINTS)
    for (x, y), (want_x, want_y) in zip(sorted(marks(svg)), expected, strict=True):
        assert x == pytest.approx(want_x, abs=0.3) and y == pytest.approx(want_y, abs=1.0)
    (whisker,) = [line for line in svg.iter("line") if line.attrib["class"].startswith("whisker")]
    ends = [at(end, upright, warp) for end in (0.4, 0.6)]
    assert [float(whisker.attrib[end]) for end in ("y1", "y2")] == pytest.approx(ends, abs=0.3)


def test_nothing_leaves_the_drawing() -> None:
    crowd = [Point(n, 0.5 + (n == 8), f"s{n}", "100000") for n in range(9)]  # marks apart, labels wider than that
    svg = drawn(crowd, Axis("x"), Axis("y", "{:.2f}"), {f"s{n}": n for n in range(9)})
    for x, y in marks(svg):
        assert 0 < x < WIDTH and 0 < y < HEIGHT
    boxes = []
    for text in svg.iter("text"):
        if text.attrib["class"] == "label":
            left, base, wide = float(text.attrib["x"]), float(text.attrib["y"]), 6.4 * len(text.text or "")
            assert left > 0 and left + wide < WIDTH
            for west, north, east, south in boxes:
                assert left > east or left + wide < west or base - 9 > south or base < north, "labels overlap"
            boxes.append((left, base - 9, left + wide, base))
    assert boxes


@pytest.mark.parametrize(("better", "path"), [("down", [(5, 0.9), (10, 0.5), (20, 0.1)]), ("up", [(5, 0.9)])])
def test_the_frontier_joins_what_nothing_beats(better: str, path: list[tuple[float, float]]) -> None:
    svg = drawn(POINTS, Axis("x"), Axis("y"), frontier=better)
    (line,) = [line for line in svg.iter("polyline") if line.attrib["class"] == "frontier"]
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(places) == len(path)
    by_x = dict(zip(sorted(p.x for p in POINTS), sorted(marks(svg)), strict=True))
    for (x, _), place in zip(path, places, strict=True):
        assert place == pytest.approx(by_x[x], abs=1.0)


def test_a_line_a_series() -> None:
    svg = drawn(POINTS, Axis("x"), Axis("y"), lines=True)
    lines = [line for line in svg.iter("polyline") if line.attrib["class"].startswith("line")]
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2]
    assert all(re.findall(r"[\d.]+,", line.attrib["points"]) == sorted(
        re.findall(r"[\d.]+,", line.attrib["points"]), key=lambda x: float(x[:-1])) for line in lines)  # fmt: skip


def test_series_are_told_apart() -> None:
    looks = set()
    for number in range(1, 1 + 7 * len(SHAPES)):
        (shape,) = [s for s in drawn([Point(1, 1, "s")], Axis("x"), Axis("y"), {"s": number}).iter()
                    if s.attrib.get("class", "").startswith("mark")]  # fmt: skip
        x, y = centre(shape)
        corners = [tuple(map(float, c.split(","))) for c in shape.attrib.get("points", "").split()]
        looks.add((shape.attrib["class"], tuple((round(a - x, 1), round(b - y, 1)) for a, b in corners)))
    assert len(looks) == 7 * len(SHAPES)


def test_one_point_and_equal_values() -> None:
    for log in (False, True):
        svg = drawn([Point(3, 0.384, "a"), Point(3, 0.384, "b")], Axis("x"), Axis("y", "{:g}", log=log))
        assert len(marks(svg)) == 2 and len(ticks(svg, "end")) >= 2


def test_text_is_escaped() -> None:
    svg = chart([Point(1, 1, "<b>", "<i>", says="a & b")], Axis("<x>"), Axis('"y"'), {"<b>": 0})
    assert "<b>" not in svg and "<i>" not in svg and "<x>" not in svg
    assert "a & b" in "".join(ElementTree.fromstring(svg).itertext())
