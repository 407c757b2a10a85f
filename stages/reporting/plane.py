"""Models by cost and quality -> the picture to choose by: a pure function that gives an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from stages.params import TEACHER
from stages.reporting.svg import (
    CHARACTER,
    FONT,
    LABEL,
    Axis,
    Box,
    cut,
    grid,
    label_boxes,
    line,
    picture,
    px,
    text,
)
from stages.reporting.templating import clean


@dataclass(frozen=True)
class Mark:
    """A model in a plane."""

    name: str
    tone: str  # CSS class of its colour
    x: float  # the model's cost, above 0
    y: float  # the model's quality
    on_front: bool  # whether no other is better by both
    is_chosen: bool = False  # whether the page names it on top

    @property
    def is_named(self) -> bool:
        """Whether its name is always drawn, and it is never grey."""
        return self.on_front or self.is_chosen or self.tone == TEACHER


def plane(
    marks: Sequence[Mark],
    *,
    x_title: str,
    y_title: str,
    x_bound: float | None = None,
    y_bound: float | None = None,
) -> Markup:
    """All models by cost and quality: a line through those on the front, the others grey.

    Each has its name beside it; but a grey one only if there is room, since its drawing says it, too.

    Args:
        marks: At least one.
        x_title: What the cost is, on the horizontal axis.
        y_title: What the quality is, on the vertical axis.
        x_bound: The cost within which one was chosen: a dashed line, where it is on the axis.
        y_bound: Likewise the quality.
    """
    marks = sorted(marks, key=lambda mark: not mark.is_named)
    named = [mark for mark in marks if mark.is_named]
    width, height = 400.0, 320.0 + LABEL * max(0, len(named) - 8)
    x = Axis.around([mark.x for mark in marks], 44, width - 12, margin=0.12, log_above=6)
    y = Axis.around([mark.y for mark in marks], height - 40, 26, margin=0.1)
    names = [cut(mark.name, 26) for mark in marks]
    places = [(x.at(mark.x), y.at(mark.y)) for mark in marks]
    boxes = label_boxes(
        places,
        [len(name) * FONT * CHARACTER + 4 for name in names],
        LABEL,
        Box(x.begin + 2, y.end + 2, x.end - 2, y.begin - 2),
        needed=len(named),
    )
    tones = [mark.tone if mark.is_named else "passed" for mark in marks]
    drawn = list(zip(marks, tones, places, names, boxes, strict=True))
    ordered = sorted((mark.x, mark.y) for mark in marks if mark.on_front)
    parts = [grid(x, y, (x_title, y_title))]
    if x_bound is not None and x.low <= x_bound <= x.high:
        parts.append(line(x.at(x_bound), y.begin, x.at(x_bound), y.end, "bound"))
    if y_bound is not None and y.low <= y_bound <= y.high:
        parts.append(line(x.begin, y.at(y_bound), x.end, y.at(y_bound), "bound"))
    if len(ordered) > 1:
        way = "L".join(f"{px(x.at(cost))} {px(y.at(good))}" for cost, good in ordered)
        parts.append(f'<path class="front" d="M{way}"/>')
    # All leaders, then all marks (those on the front last), then all names: nothing is drawn over a name.
    parts += [
        f'<g class="{tone}">{leader}</g>'
        for _, tone, place, _, box in drawn
        if box and (leader := _leader(place, box))
    ]
    parts += [
        f'<g class="{tone}"><circle class="chosen" cx="{px(left)}" cy="{px(top)}" r="9"/></g>'
        for mark, tone, (left, top), _, _ in drawn
        if mark.is_chosen
    ]
    parts += [
        f'<circle class="dot {tone}" cx="{px(left)}" cy="{px(top)}" r="5">'
        f"<title>{escape(clean(_description(mark)))}</title></circle>"
        for mark, tone, (left, top), _, _ in reversed(drawn)
    ]
    parts += [
        text(box.left + 2, box.bottom - 4, name, f"label {tone}")
        for _, tone, _, name, box in drawn
        if box
    ]
    described = "; ".join(map(_description, marks))
    best = ", ".join(mark.name for mark in named if mark.on_front)
    return picture(width, height, f"{y_title} against {x_title}: {described}. Front: {best}", parts)


def _description(mark: Mark) -> str:
    return f"{mark.name} {mark.x:,.4g}, {mark.y:,.4g}"


def _leader(place: tuple[float, float], box: Box) -> str:
    """A thin line from a point to its label, where that is not right beside it."""
    x, y = place
    to_x, to_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
    apart = (to_x - x) ** 2 + (to_y - y) ** 2
    return line(x, y, to_x, to_y, "leader") if apart > 100 else ""
