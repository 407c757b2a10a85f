"""What charts are drawn with: escaped text, axes, and labels that keep out of each other's way.

Colours are CSS classes: a chart says whose mark it is (`tone`), the page's style what that looks like.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from stages.reporting.templating import clean

FONT = 12  # pixels; the page's style has the same
LABEL = 15  # height of a label
NEAR = 12  # pixels from a point to a label that reads as its own without a leader
CHARACTER = 0.68  # width of a character as a share of the font size: a wide bold font's


def cut(name: str, most: int) -> str:
    """A name of at most `most` characters, cut in the middle: ends tell alike names apart."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def px(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{round(value, 1) + 0.0:g}"  # + 0.0: no -0


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along pixels from `begin` to `end`."""

    low: float  # value at `begin`
    high: float  # value at `end`, above `low`
    begin: float  # pixel
    end: float  # pixel
    log: bool = False  # equal ratios take equal space; both values are above 0

    @classmethod
    def around(
        cls,
        values: Sequence[float],
        begin: float,
        end: float,
        *,
        margin: float = 0.08,
        log_above: float = 20,
    ) -> Axis:
        """An axis with all of the values (at least one) on it, and some room beside them.

        Positive values that differ by more than `log_above` times stand on a logarithmic axis.
        """
        low, high = min(values), max(values)
        if low > 0 and high / low > log_above:
            room = (high / low) ** margin
            return cls(low / room, high * room, begin, end, log=True)
        room = margin * ((high - low) or abs(high) or 1)
        return cls(low - room, high + room, begin, end)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        place = [math.log(v) if self.log else v for v in (self.low, value, self.high)]
        share = (place[1] - place[0]) / (place[2] - place[0])
        return self.begin + share * (self.end - self.begin)

    def ticks(self, about: int = 4) -> list[tuple[float, str]]:
        """Round values on the axis with their text, about this many."""
        if self.log:
            return self._log_ticks()
        step = _nice((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(n * step, f"{n * step + 0.0:,.{decimals}f}") for n in range(first, last + 1)]

    def _log_ticks(self) -> list[tuple[float, str]]:
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1,) if len(exponents) > 4 else (1, 2, 5)
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        return [(v, f"{v:,.12g}") for v in ticks if self.low <= v <= self.high]


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, ... that is no smaller."""
    size = 10.0 ** math.floor(math.log10(step))
    return next(digit * size for digit in (1, 2, 5, 10) if digit * size >= step * (1 - 1e-9))


def picture(width: float, height: float, says: str, body: Sequence[str]) -> Markup:
    """An SVG of `width` x `height` pixels; `says` describes it to people who cannot see it."""
    return Markup(
        f'<svg viewBox="0 0 {px(width)} {px(height)}" role="img" aria-label="{escape(clean(says))}">'
        f"{''.join(body)}</svg>"
    )


def text(x: float, y: float, words: str, kind: str = "", *, anchor: str = "start") -> str:
    """Words on a base line at (x, y); `kind` is their CSS class."""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    klass = f' class="{kind}"' if kind else ""
    return f'<text x="{px(x)}" y="{px(y)}"{where}{klass}>{escape(clean(words))}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line of a CSS class."""
    return f'<path class="{kind}" d="M{px(x1)} {px(y1)}L{px(x2)} {px(y2)}"/>'


def grid(x: Axis, y: Axis, titles: tuple[str, str], *, about: tuple[int, int] = (5, 6)) -> str:
    """Grid lines, the numbers on both axes, and their titles (below on the right, above on the left)."""
    parts = []
    for value, label in y.ticks(about[1]):
        parts.append(line(x.begin, y.at(value), x.end, y.at(value), "grid"))
        parts.append(text(x.begin - 6, y.at(value) + 4, label, "tick", anchor="end"))
    for value, label in x.ticks(about[0]):
        parts.append(line(x.at(value), y.begin, x.at(value), y.end, "grid"))
        parts.append(text(x.at(value), y.begin + 16, label, "tick", anchor="middle"))
    parts.append(text(x.end, y.begin + 32, titles[0], "tick", anchor="end"))
    parts.append(text(0, y.end - 8, titles[1], "tick"))
    return "".join(parts)


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels, y downward."""

    left: float
    top: float
    right: float
    bottom: float

    def hits(self, other: Box) -> bool:
        """Whether they share a point inside."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        """Whether all of it lies in `other`."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def label_boxes(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    height: float,
    frame: Box,
    needed: int | None = None,
) -> list[Box | None]:
    """A place for the label of each point: near it, inside `frame`, on no point and on no other label.

    Where nothing is free (more labels than room), a needed label stands right of its point; any other
    has none, nor where it would be far from its point.

    Args:
        points: (x, y) of n points; the first choose first.
        widths: Pixels, of the n labels.
        height: Pixels, the same for every label.
        frame: Where labels may be.
        needed: How many of the first labels must stand somewhere; None for all.
    """
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    boxes: list[Box | None] = []
    for place, ((x, y), width) in enumerate(zip(points, widths, strict=True)):
        is_needed = needed is None or place < needed
        candidates = list(_around(x, y, width, height, frame))
        free = (
            box
            for box in candidates
            if box.inside(frame)
            and not any(box.hits(other) for other in taken)
            and (is_needed or _distance(x, y, box) < NEAR)
        )
        box = next(free, candidates[0] if is_needed else None)
        if box is not None:
            # Two names on one line need a gap, or they read as one.
            taken.append(Box(box.left - 8, box.top, box.right + 8, box.bottom))
        boxes.append(box)
    return boxes


def _around(x: float, y: float, width: float, height: float, frame: Box) -> Iterator[Box]:
    """Boxes near a point: right, left, above, below, then all others in the frame, nearest first."""
    for left, middle in (
        (x + 9, y),
        (x - 9 - width, y),
        (x - width / 2, y - 8 - height / 2),
        (x - width / 2, y + 8 + height / 2),
    ):
        yield Box(left, middle - height / 2, left + width, middle + height / 2)
    steps = [
        (left, top)
        for left in range(math.ceil(frame.left), math.floor(frame.right - width) + 1, 6)
        for top in range(math.ceil(frame.top), math.floor(frame.bottom - height) + 1, 4)
    ]
    boxes = [Box(left, top, left + width, top + height) for left, top in steps]
    yield from sorted(boxes, key=lambda box: _distance(x, y, box))


def _distance(x: float, y: float, box: Box) -> float:
    return math.hypot(max(box.left - x, x - box.right, 0), max(box.top - y, y - box.bottom, 0))


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart, between `low` and `high`, each near the one it wanted.

    In the order of `wanted`. Those that would touch stand in a row around the middle of what they
    wanted. With no room for all, they stand evenly.
    """
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    rows: list[tuple[float, list[int]]] = []  # where a row begins, who stands in it
    for i in order:
        row, begin = [i], min(max(wanted[i], low), high)
        while rows and rows[-1][0] + gap * len(rows[-1][1]) > begin:
            row = [*rows.pop()[1], *row]
            middle = sum(wanted[j] - gap * place for place, j in enumerate(row)) / len(row)
            begin = min(max(middle, low), high - gap * (len(row) - 1))
        rows.append((begin, row))
    places = {i: begin + gap * place for begin, row in rows for place, i in enumerate(row)}
    return [places[i] for i in range(len(wanted))]
