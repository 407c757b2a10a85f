"""Numbers of models -> pictures: pure functions that give an SVG, its texts escaped.

Each is drawn at about the size in which it is shown, so that its text can be read on a phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from stages.reporting.results import Points, Similarities
from stages.reporting.svg import (
    CHARACTER,
    FONT,
    LABEL,
    Axis,
    cut,
    grid,
    line,
    picture,
    px,
    spread,
    text,
)

FEW_POINTS = 12  # of a line: more would hide it


@dataclass(frozen=True)
class Bar:
    """A model's share of the teacher."""

    name: str
    tone: str  # CSS class of its colour
    percent: float  # 0 and above; 100 is as much as the teacher
    decimals: int = 1  # how many of it are known

    @property
    def label(self) -> str:
        """The number as it is written."""
        return f"{self.percent:.{self.decimals}f} %"


@dataclass(frozen=True)
class Line:
    """A value of a model by step."""

    name: str
    tone: str  # CSS class of its colour
    points: Points  # step and value; at least one
    best: int | None = None  # the step whose weights were kept, if known


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """A bar from 0 for each of one or more models, with its number; a thin line at 100 %, the teacher."""
    width, row = 320.0, 34
    x = Axis(0, max(100.0, *(bar.percent for bar in rows)), 0, width)
    height = row * len(rows) + 4
    parts = []
    for place, bar in enumerate(rows):
        y = place * row
        parts.append(
            text(0, y + 14, cut(bar.name, 32), "name")
            + text(width, y + 14, bar.label, "value", anchor="end")
            + f'<g class="{bar.tone}"><rect class="track" x="0" y="{y + 20}" height="8"'
            f' width="{px(x.at(100))}" rx="2"/><rect class="bar" x="0" y="{y + 20}" height="8"'
            f' width="{px(x.at(max(bar.percent, 0)))}" rx="2"/></g>'
            + line(x.at(100) - 0.75, y + 18, x.at(100) - 0.75, y + 30, "teacher edge")
        )
    alt = ", ".join(f"{bar.name} {bar.label}" for bar in rows)
    return picture(width, height, f"{title}, in % of the teacher: {alt}", parts)


def lines(rows: Sequence[Line], *, title: str) -> Markup:
    """A line by step for one or more models, the name at its end, a ring at the weights that were kept."""
    width, height = 400.0, 300.0
    names = [cut(row.name, 18) for row in rows]
    room = max(map(len, names)) * FONT * CHARACTER + 24
    values = [value for row in rows for _, value in row.points]
    steps = [step for row in rows for step, _ in row.points]
    x = Axis(0, max(*steps, 1), 44, width - room)
    y = Axis.around(values, height - 40, 26)
    ends = [y.at(row.points[-1][1]) for row in rows]
    labels = spread(ends, LABEL, y.end + 4, y.begin - 4)
    parts = [grid(x, y, ("step", title))]
    for row, name, end, label in zip(rows, names, ends, labels, strict=True):
        last = x.at(row.points[-1][0])
        parts.append(
            f'<g class="{row.tone}">{_path(row.points, x, y)}{_ring(row, x, y)}'
            + (
                line(last + 5, end, x.end + 15, label, "leader")
                if _apart(last, end, x, label)
                else ""
            )
            + text(x.end + 18, label + 4, name, "label")
            + "</g>"
        )
    alt = "; ".join(f"{row.name} ends at {row.points[-1][1]:.4g}" for row in rows)
    return picture(width, height, f"{title} by step: {alt}", parts)


def small_line(row: Line, *, title: str) -> Markup:
    """One line in a small picture: lowest and highest value, last step."""
    width, height = 200.0, 96.0
    values = [value for _, value in row.points]
    x = Axis(0, max(*(step for step, _ in row.points), 1), 44, width - 6)
    y = Axis.around(values, height - 20, 8)
    low, high = min(values), max(values)
    parts = [line(x.begin, y.begin, x.end, y.begin, "axis")]
    parts += [
        text(x.begin - 6, y.at(value) + 4, f"{value:.3g}", "tick", anchor="end")
        for value in ([low, high] if y.at(low) - y.at(high) > FONT else [low])
    ]
    parts.append(text(x.end, height - 5, f"step {row.points[-1][0]:,.0f}", "tick", anchor="end"))
    parts.append(f'<g class="{row.tone}">{_path(row.points, x, y)}</g>')
    alt = f"{title} of {row.name}: from {values[0]:.4g} to {values[-1]:.4g}"
    return picture(width, height, alt, parts)


def histogram(seen: Similarities, name: str, tone: str) -> Markup:
    """How the cosines of all pairs are spread: the teacher's as an area, the model's as a line.

    Args:
        seen: How many pairs lie in each bin; each side is drawn as shares of its own sum.
        name: The model's name.
        tone: CSS class of its colour.
    """
    width, height = 320.0, 170.0
    shares = [
        [count / max(sum(counts), 1) for count in counts] for counts in (seen.teacher, seen.model)
    ]
    x = Axis(seen.edges[0], seen.edges[-1], 4, width - 4)
    y = Axis(0, max(*shares[0], *shares[1], 1e-9), height - 24, 6)
    outlines = [_steps(seen.edges, share, x, y) for share in shares]
    parts = [
        f'<path class="area" d="{outlines[0]}Z"/>',
        f'<g class="{tone}"><path class="line" d="{outlines[1]}"/></g>',
        line(x.begin, y.begin, x.end, y.begin, "axis"),
    ]
    parts += [
        text(x.at(value), height - 8, label, "tick", anchor="middle")
        for value, label in x.ticks()
        if x.begin + 8 < x.at(value) < x.end - 8
    ]
    means = [_mean(seen.edges, share) for share in shares]
    alt = (
        f"Cosines of all pairs: {name} has a mean of {means[1]:.2f}, the teacher of {means[0]:.2f}"
    )
    return picture(width, height, alt, parts)


def scatter(pairs: Points, name: str, tone: str, *, span: tuple[float, float]) -> Markup:
    """A dot for each pair of texts: the teacher's cosine, and upward the model's; equal on the diagonal.

    Args:
        pairs: The teacher's cosine, the model's; at least one pair.
        name: The model's name.
        tone: CSS class of its colour.
        span: Lowest and highest cosine on the axes. One for all pictures that stand side by side.
    """
    width, height = 320.0, 300.0
    # One scale for both sides, or the diagonal would say nothing.
    low, high = span[0] - 0.03, span[1] + 0.03
    x, y = Axis(low, high, 36, width - 6), Axis(low, high, height - 40, 26)
    dots = "".join(f"M{px(x.at(theirs))} {px(y.at(ours))}h0" for theirs, ours in pairs)
    parts = [
        grid(x, y, ("cosine, teacher", f"cosine, {cut(name, 28)}"), about=(4, 4)),
        line(x.begin, y.begin, x.end, y.end, "diagonal"),
        f'<g class="{tone}"><path class="dots" d="{dots}"/></g>',
    ]
    gap = sum(abs(ours - theirs) for theirs, ours in pairs) / len(pairs)
    alt = f"Cosines of {len(pairs)} pairs, {name} against the teacher: {gap:.2f} apart on average"
    return picture(width, height, alt, parts)


def gauge(values: Mapping[str, tuple[str, float]]) -> Markup:
    """Cosines of one pair, by name with a CSS class, on a line from -0.2 (or lower) to 1."""
    width, height = 200.0, 26.0
    x = Axis(min(-0.2, *(value for _, value in values.values())), 1, 8, width - 8)
    places = [x.at(value) for _, value in values.values()]
    parts = [
        line(x.begin, 13, x.end, 13, "axis"),
        line(x.at(0), 9, x.at(0), 17, "axis"),
        line(min(places), 13, max(places), 13, "span"),
    ]
    parts += [
        f'<circle class="dot {tone}" cx="{px(x.at(value))}" cy="13" r="5"/>'
        for tone, value in values.values()
    ]
    alt = ", ".join(f"{name} {value:.2f}" for name, (_, value) in values.items())
    return picture(width, height, f"cosine: {alt}", parts)


def _path(points: Points, x: Axis, y: Axis) -> str:
    """A line through points; those of a short run are marked, to show how few they are."""
    way = "L".join(f"{px(x.at(step))} {px(y.at(value))}" for step, value in points)
    # A line of one point is a dot: its end is round.
    marks = "".join(
        f'<circle class="point" cx="{px(x.at(step))}" cy="{px(y.at(value))}" r="3"/>'
        for step, value in (points if len(points) <= FEW_POINTS else ())
    )
    return f'<path class="line" d="M{way}{"h0" if len(points) == 1 else ""}"/>{marks}'


def _ring(row: Line, x: Axis, y: Axis) -> str:
    rings = [(step, value) for step, value in row.points if step == row.best]
    return "".join(
        f'<circle class="ring" cx="{px(x.at(step))}" cy="{px(y.at(value))}" r="4.5"/>'
        for step, value in rings
    )


def _apart(last: float, end: float, x: Axis, label: float) -> bool:
    """Whether a line ends so far from its label that something must join them."""
    return abs(end - label) > 3 or x.end - last > 6


def _steps(edges: Sequence[float], shares: Sequence[float], x: Axis, y: Axis) -> str:
    parts = [f"M{px(x.at(edges[0]))} {px(y.begin)}"]
    for right, share in zip(edges[1:], shares, strict=True):
        parts.append(f"V{px(y.at(share))}H{px(x.at(right))}")
    return f"{''.join(parts)}V{px(y.begin)}"


def _mean(edges: Sequence[float], shares: Sequence[float]) -> float:
    """Of counted values, each taken as the middle of its bin."""
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    return sum(middle * share for middle, share in zip(middles, shares, strict=True))
