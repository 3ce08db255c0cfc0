"""Draw layouts: signed distances for shapes and their patterns, and letters of 5x7 squares.

Lengths scale with the shorter side of the image. Centres lie on a grid of tokens, and at 256 pixels
patterns repeat with the grid, so that there are few ways for an edge to cross a pattern.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

from flux.toy.scenes import COLOURS, LETTERS, Item, Layout, Object, Scene, arrange

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]  # at x, y: negative inside

TOKEN = 16  # pixels
PERIOD = 1 / 16  # of a pattern, over the shorter side
RIM = 1 / 64  # of a patterned object, plain, so that its shape is seen
FRAME = (150, 95, 45), 1 / 32  # the colour of wood, which no thing has; width over shorter side
UNIT = 1 / 32  # side of a letter's squares over the shorter side; letters are 1 square apart


def draw(
    scene: Scene | Layout, width: int, height: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Return the image (H, W, 3) uint8. `rng` draws the attributes that a scene leaves open."""
    if isinstance(scene, Layout):
        layout = scene
    else:
        assert rng is not None, "rng: is missing. Pass the generator that arranges the scene"
        layout = arrange(scene, rng)
    image = np.broadcast_to(_rgb(layout.background), (height, width, 3))
    for item in layout.items:
        alpha = ink(item, width, height)[..., None]
        image = image * (1 - alpha) + _rgb(item.thing.colour) * alpha
    return np.rint(image).astype(np.uint8)


def _rgb(colour: str) -> np.ndarray:
    return np.array(COLOURS[colour], np.float32)


def framed(image: np.ndarray) -> np.ndarray:
    """Put an image (H, W, 3) into a wooden frame: a new style, for a LoRA to teach."""
    colour, width = FRAME
    border = round(width * min(image.shape[:2]))
    result = np.empty_like(image)
    result[:] = colour
    inside = slice(border, -border), slice(border, -border)
    result[inside] = image[inside]
    return result


def ink(item: Item, width: int, height: int) -> np.ndarray:
    """Return how much of each pixel a thing covers, (H, W) in [0, 1]."""
    if isinstance(item.thing, Object):
        x, y, radius = place(item, width, height)
        return coverage(item.thing.shape, x, y, radius, width, height, item.thing.pattern)
    return np.sum(spelled(item.thing.letters, item.y * height, width, height), axis=0)


def place(item: Item, width: int, height: int) -> tuple[int, int, float]:
    """Return the centre of an object, on the grid, and its radius in pixels; it stays inside."""
    grid, radius = grid_of(width, height), item.radius * min(width, height)
    least = math.ceil(1.2 * radius / grid)
    x, y = (
        grid * int(np.clip(round(c * n / grid), least, n // grid - least))
        for c, n in ((item.x, width), (item.y, height))
    )
    return x, y, radius


def grid_of(width: int, height: int) -> int:
    """Return the pixels between points of the grid: those of a token, if quarters are on the grid.

    Pairs stand at a quarter of the image and at three quarters.
    """
    return math.gcd(min(width, height) // 4, TOKEN)


# ---------------------------------------------------------------- shapes


def polygon(*points: tuple[float, float]) -> Distance:
    """Return the signed distance to a polygon (negative inside), in units of its radius."""
    corners = np.array(points, dtype=np.float32)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest, inside = np.full(x.shape, np.inf, np.float32), np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
            along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, np.hypot(px - along * ex, py - along * ey))
            if ay != by:  # even-odd rule: count the edges that a ray to the right crosses
                inside ^= ((ay > y) != (by > y)) & (px < py * ex / ey)
        return np.where(inside, -nearest, nearest)

    return distance


def wheel(count: int, *radii: float) -> list[tuple[float, float]]:
    """Return `count` corners at equal angles from the top, with these radii in turn."""
    turns = 2 * np.pi * np.arange(count) / count
    return [
        (radii[i % len(radii)] * np.sin(a), -radii[i % len(radii)] * np.cos(a))
        for i, a in enumerate(turns)
    ]


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two discs over a triangle whose sides touch them."""
    x, y = np.abs(x), y + 0.08
    lobes = np.hypot(x - 0.46, y + 0.36) - 0.55
    # the line from the tip to the right disc
    side, tip = np.array((0.7071, 0.7071), np.float32), 1.05
    below = np.maximum.reduce([x * side[0] + (y - tip) * side[1], -(y + 0.36), x - 1.0])
    return np.minimum(lobes, below)


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A disc less another to its right."""
    x = x - 0.3
    return np.maximum(np.hypot(x, y) - 1.05, 0.8 - np.hypot(x - 0.55, y))


_ARM, _TIP = 0.36, 1.0
_QUARTER = [(_ARM, -_TIP), (_ARM, -_ARM), (_TIP, -_ARM)]
DISTANCES = {  # signed, in units of the radius, with the centre of mass near the origin
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "square": polygon((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": polygon(*wheel(3, 1.2)),
    "star": polygon(*wheel(10, 1.2, 0.55)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) - 0.26,
    "cross": polygon(
        *[
            (x * c - y * s, x * s + y * c)
            for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
            for x, y in _QUARTER
        ]
    ),
    "heart": _heart,
    "moon": _moon,
}


def coverage(
    shape: str, x: float, y: float, radius: float, width: int, height: int, pattern: str = ""
) -> np.ndarray:
    """Return how much of each pixel a shape covers, (H, W) in [0, 1]: an edge is one pixel wide.

    A pattern is fixed in the image: an object is a window on it.
    """
    reach = 1.2 * radius + 2  # no shape reaches further: only this window is computed
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 1)
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 1)
    covered = np.zeros((height, width), np.float32)
    if left < right and top < bottom:
        ys, xs = np.mgrid[top:bottom, left:right].astype(np.float32) + 0.5
        distance = DISTANCES[shape]((xs - x) / radius, (ys - y) / radius) * radius
        if pattern:
            short = min(width, height)
            holes = np.minimum(PATTERN[pattern](xs, ys, PERIOD * short), -distance - RIM * short)
            distance = np.maximum(distance, holes)
        covered[top:bottom, left:right] = np.clip(0.5 - distance, 0, 1)
    return covered


# ---------------------------------------------------------------- patterns


def _off(n: np.ndarray, period: float) -> np.ndarray:
    """Return the distance to the nearest of a row of points, the first at a quarter period."""
    return ((n / period + 0.25) % 1 - 0.5) * period


def _wave(n: np.ndarray, period: float) -> np.ndarray:
    """Signed distance to bands half a period wide, along one axis; one begins at 0."""
    return np.abs(_off(n, period)) - period / 4


def _dotted(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """Round holes."""
    return period * 0.3 - np.hypot(_off(x, period), _off(y, period))


def _checkered(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """Squares half a period wide, one in two of them."""
    u, v = _wave(x, period), _wave(y, period)
    return np.where((u < 0) == (v < 0), -1, 1) * np.minimum(np.abs(u), np.abs(v))


PATTERN = {  # signed distance in pixels: negative is the object's colour, positive the background
    "striped": lambda x, y, period: _wave(y, period),
    "hatched": lambda x, y, period: _wave((x + y) * 0.7071, period * 1.4142),
    "dotted": _dotted,
    "checkered": _checkered,
}


# ---------------------------------------------------------------- letters

_ALPHABET = """
.###. ####. .###. ####. ##### ##### .###. #...# .###. ..### #...# #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. ...#. #..#. #.... ##.##
#...# #...# #.... #...# #.... #.... #.... #...# ..#.. ...#. #.#.. #.... #.#.#
##### ####. #.... #...# ####. ####. #.### ##### ..#.. ...#. ##... #.... #.#.#
#...# #...# #.... #...# #.... #.... #...# #...# ..#.. ...#. #.#.. #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. #..#. #..#. #.... #...#
#...# ####. .###. ####. ##### #.... .###. #...# .###. .##.. #...# ##### #...#

#...# .###. ####. .###. ####. .#### ##### #...# #...# #...# #...# #...# #####
#...# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# #...# #...# ....#
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#.#.# #...# ####. #...# ####. .###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#..
#..## #...# #.... #.#.# #.#.. ....# ..#.. #...# #...# #.#.# .#.#. ..#.. .#...
#...# #...# #.... #..#. #..#. ....# ..#.. #...# .#.#. ##.## #...# ..#.. #....
#...# .###. #.... .##.# #...# ####. ..#.. .###. ..#.. #...# #...# ..#.. #####
"""
# (2, 7, 13) strings of five squares
_LINES = [[line.split() for line in half.split("\n")] for half in _ALPHABET.strip().split("\n\n")]
_BITS = np.array(
    [
        [[square == "#" for square in row] for row in rows]
        for half in _LINES
        for rows in zip(*half, strict=True)
    ]
)
GLYPHS = dict(zip(LETTERS, _BITS.astype(np.float32), strict=True))  # (7, 5) each


def spelled(letters: str, y: float, width: int, height: int) -> list[np.ndarray]:
    """Return a page (H, W) of 0 and 1 for each letter of a centred line near the height y."""
    grid, unit = grid_of(width, height), max(1, round(UNIT * min(width, height)))
    middles, sizes = (width / 2, y), ((6 * len(letters) - 1) * unit, 7 * unit)
    left, top = (
        grid * round((middle - size / 2) / grid)
        for middle, size in zip(middles, sizes, strict=True)
    )
    pages = []
    for x, letter in zip(itertools.count(left, 6 * unit), letters):
        pages.append(np.zeros((height, width), np.float32))
        pages[-1][top : top + 7 * unit, x : x + 5 * unit] = (
            GLYPHS[letter].repeat(unit, 0).repeat(unit, 1)
        )
    return pages
