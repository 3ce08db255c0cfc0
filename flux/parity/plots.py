"""Drawings that come out as SVG, as PNG, and in both with the same coordinates.

A drawing is a list of shapes, in pixels from the upper left corner. Colours have names: in SVG they are variables of the
page's style sheet, so that they follow the reader's light or dark mode; in a PNG they are the light ones. They are Okabe and
Ito's, whom every kind of colour vision can tell apart, and what is over budget has a shape of its own besides.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
EDGES = (
    1e-3,
    3e-3,
    0.01,
    0.03,
    0.1,
    0.3,
    1,
    3,
    10,
    30,
    100,
    1000,
)  # of the shades of an error over its budget
WITHIN = EDGES.index(1) + 1  # that many shades are for tensors within budget
SHADES = 9  # of values that have no budget
SCALE, SUPERSAMPLED = (
    2,
    2,
)  # a PNG has twice the pixels, and is drawn with twice as many again: Pillow's lines are jagged

# ---------------------------------------------------------------- colours


def mix(a: str, b: str, share: float) -> str:
    """#rrggbb, `share` of the way from a to b."""
    pairs = ((int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in pairs)


def palette(
    page: str,
    surface: str,
    ink: str,
    muted: str,
    grid: str,
    first: str,
    middle: str,
    last: str,
    over: str,
    mild: str,
    severe: str,
    deep: str,
) -> dict[str, str]:
    """Every colour by its name: those given, and shades w* within budget, o* over it, t* of other values."""
    out = dict(
        page=page,
        surface=surface,
        ink=ink,
        muted=muted,
        grid=grid,
        first=first,
        middle=middle,
        last=last,
        over=over,
        equal=mix(surface, grid, 0.5),
    )
    beyond = len(EDGES) - WITHIN
    out |= {f"w{i}": mix(surface, first, 0.1 + 0.6 * i / (WITHIN - 1)) for i in range(WITHIN)}
    out |= {f"o{i}": mix(mild, severe, i / beyond) for i in range(beyond + 1)}
    return out | {
        f"t{i}": mix(surface, deep, 0.04 + 0.96 * i / (SHADES - 1)) for i in range(SHADES)
    }


LIGHT = palette(
    "#f5f6f8",
    "#ffffff",
    "#1a1e24",
    "#5b6470",
    "#e1e5ea",
    "#0072b2",
    "#009e73",
    "#b05a8c",
    "#d55e00",
    "#f4ab62",
    "#701c00",
    "#3f1d6b",
)
DARK = palette(
    "#0f1115",
    "#171a20",
    "#e9ebee",
    "#9ba5b2",
    "#2c323b",
    "#56b4e9",
    "#35c39a",
    "#e093bd",
    "#ff8d3f",
    "#b4560d",
    "#ffe3c4",
    "#d9bdff",
)


def shade(ratio: float, over: bool = False) -> str:
    """The colour of an error that is `ratio` of what is allowed; `over` without being larger: a guard's verdict."""
    if ratio == 0 and not over:
        return "equal"
    index = next((i for i, edge in enumerate(EDGES) if ratio <= edge), len(EDGES))
    index = max(index, WITHIN) if over else index
    return f"w{index}" if index < WITHIN else f"o{index - WITHIN}"


# ---------------------------------------------------------------- shapes


class Canvas:
    """A picture under way, in pixels that are `zoom` times smaller than a drawing's."""

    def __init__(self, width: float, height: float, colours: dict[str, str] = LIGHT):
        self.zoom, self.colours = SCALE * SUPERSAMPLED, colours
        self.image = Image.new(
            "RGB", (round(width * self.zoom), round(height * self.zoom)), colours["surface"]
        )
        self.draw = ImageDraw.Draw(self.image)

    def at(self, points: Iterable[Point]) -> list[Point]:
        return [(x * self.zoom, y * self.zoom) for x, y in points]


@dataclass(frozen=True)
class Line:
    points: Sequence[Point]
    colour: str
    width: float = 1.5
    dashed: bool = False

    def svg(self) -> str:
        dashes = ' stroke-dasharray="5 4"' * self.dashed
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)
        look = (
            f'stroke="var(--{self.colour})" stroke-width="{self.width:g}" stroke-linejoin="round"'
        )
        return f'<polyline points="{path}" fill="none" {look}{dashes}/>'

    def paint(self, on: Canvas) -> None:
        width = round(self.width * on.zoom)
        for piece in dashes(self.points) if self.dashed else [self.points]:
            on.draw.line(on.at(piece), on.colours[self.colour], width, "curve")


@dataclass(frozen=True)
class Dots:
    """Many at once, small in the file: one path of lines without length, whose round ends are seen."""

    points: Sequence[Point]
    colour: str
    size: float = 3

    def svg(self) -> str:
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in self.points)
        return f'<path d="{path}" stroke="var(--{self.colour})" stroke-width="{self.size:g}" stroke-linecap="round"/>'

    def paint(self, on: Canvas) -> None:
        for point in on.at(self.points):
            on.draw.circle(point, self.size / 2 * on.zoom, on.colours[self.colour])


@dataclass(frozen=True)
class Diamond:
    """What is over its budget; pointing at it tells its `title`."""

    x: float
    y: float
    title: str
    size: float = 4
    hollow: bool = False

    @property
    def corners(self) -> list[Point]:
        sides = ((0, -1), (1, 0), (0, 1), (-1, 0))
        return [(self.x + right * self.size, self.y + down * self.size) for right, down in sides]

    @property
    def look(self) -> tuple[str, str]:
        """Of its inside, and of its edge."""
        return ("surface", "over") if self.hollow else ("over", "surface")

    def svg(self) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in self.corners)
        fill, stroke = self.look
        return f'<polygon points="{path}" fill="var(--{fill})" stroke="var(--{stroke})">{titled(self.title)}</polygon>'

    def paint(self, on: Canvas) -> None:
        on.draw.polygon(on.at(self.corners), *(on.colours[name] for name in self.look), on.zoom)


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str = ""
    outline: bool = False  # that alone

    def svg(self) -> str:
        place = (
            f'x="{self.x:.1f}" y="{self.y:.1f}" width="{self.width:.1f}" height="{self.height:.1f}"'
        )
        look = (
            f'fill="none" stroke="var(--{self.colour})" stroke-width="2"'
            if self.outline
            else f'fill="var(--{self.colour})"'
        )
        return f"<rect {place} {look}>{titled(self.title)}</rect>"

    def paint(self, on: Canvas) -> None:
        (left, top), (right, bottom) = on.at(
            [(self.x, self.y), (self.x + self.width, self.y + self.height)]
        )
        colour = on.colours[self.colour]
        if self.outline:
            half = on.zoom
            on.draw.rectangle(
                (left - half, top - half, right + half, bottom + half), None, colour, 2 * half
            )
        else:
            on.draw.rectangle((left, top, right - 1, bottom - 1), colour)


@dataclass(frozen=True)
class Label:
    x: float
    y: float  # of the base line
    text: str
    colour: str = "muted"
    size: float = 11
    anchor: str = "start"  # or middle, or end

    def svg(self) -> str:
        where = "" if self.anchor == "start" else f' text-anchor="{self.anchor}"'
        look = f'fill="var(--{self.colour})" font-size="{self.size:g}"{where}'
        return f'<text x="{self.x:.1f}" y="{self.y:.1f}" {look}>{escape(self.text)}</text>'

    def paint(self, on: Canvas) -> None:
        (place,) = on.at([(self.x, self.y)])
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[self.anchor]
        on.draw.text(place, self.text, on.colours[self.colour], font(self.size * on.zoom), anchor)


@cache
def font(size: float) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def titled(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def dashes(points: Sequence[Point], on: float = 5, off: float = 4) -> Iterable[list[Point]]:
    """A line cut into dashes, each straight piece from its beginning."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        length = math.dist((x0, y0), (x1, y1))
        for start in range(math.ceil(length / (on + off))):
            ends = start * (on + off), min(start * (on + off) + on, length)
            yield [(x0 + (x1 - x0) * end / length, y0 + (y1 - y0) * end / length) for end in ends]


# ---------------------------------------------------------------- drawings


@dataclass
class Drawing:
    title: str
    width: float
    height: float
    shapes: list = field(default_factory=list)

    def svg(self) -> str:
        shapes = "".join(shape.svg() for shape in self.shapes)
        size = f'viewBox="0 0 {self.width:g} {self.height:g}" style="max-width:{self.width:g}px"'
        return f'<svg {size} role="img" aria-label="{escape(self.title)}">{shapes}</svg>'

    def png(self) -> bytes:
        canvas = Canvas(self.width, self.height)
        for shape in self.shapes:
            shape.paint(canvas)
        file = io.BytesIO()
        canvas.image.reduce(SUPERSAMPLED).save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class LogScale:
    """Values -> y. A zero, which has no logarithm, lies on a rail below the axis, and what is no number on one above."""

    low: int  # powers of ten
    high: int
    top: float
    bottom: float

    @classmethod
    def around(cls, values: Iterable[float], top: float, bottom: float) -> "LogScale":
        """From a power of ten to a power of ten, with all the values that are finite and positive in between."""
        logs = [math.log10(value) for value in values if 0 < value < math.inf] or [-8, 0]
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(low, max(high, low + 2), top, bottom)

    def __call__(self, value: float) -> float:
        if value == 0:
            return self.bottom + 18
        if not math.isfinite(value):
            return self.top - 18
        return self.bottom - (math.log10(value) - self.low) / (self.high - self.low) * (
            self.bottom - self.top
        )

    def ticks(self) -> list[float]:
        """Powers of ten, eight at most."""
        every = math.ceil((self.high - self.low) / 8)
        return [10.0**power for power in range(self.low, self.high + 1, every)]
