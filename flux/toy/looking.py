"""Find the layout that an image shows: the drawing inverted.

Colours are found by thresholds, shapes, patterns and letters by a comparison with drawings. Where
an image differs from the likeliest drawing by more than a speck, its shape, pattern or letter is
UNKNOWN.
"""

from functools import cache

import numpy as np

from flux.toy.drawing import DISTANCES, GLYPHS, PATTERN, PERIOD, UNIT, coverage
from flux.toy.scenes import COLOURS, SHAPES, SIZES, Item, Layout, Object, Word, nearest_place

UNKNOWN = "?"


def look(image: np.ndarray) -> Layout:
    """Return the layout of an image (H, W, 3) uint8: the things of each colour but the background.

    A pixel belongs to the nearest palette colour that the image has. A colour counts where it fills
    squares, so that blends along edges do not count. The background is the border's main colour.
    """
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), np.float32)
    nearness = 2 * image.astype(np.float32) @ palette.T - np.square(palette).sum(1)  # (H, W, 10)
    labels = nearness.argmax(-1)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    background = np.bincount(border).argmax()
    found = [
        n
        for n in range(len(names))
        if n != background and _fills_squares(labels == n, min(labels.shape))
    ]
    labels = nearness[..., [background, *found]].argmax(-1)
    items = []
    for number, n in enumerate(found, 1):
        items += _things(_tidy(labels == number), names[n])
    return Layout(tuple(items), names[background])


def _things(mask: np.ndarray, colour: str) -> list[Item]:
    """Return the things of a mask (H, W): one, or several whole ones with gaps between them."""
    one = _thing(mask, colour)
    if not whole(one):
        for outline in (mask, _closed(mask, min(mask.shape))):  # the gaps of a pattern do not part
            parts = [_thing(part, colour) for part in _split(mask, outline)]
            if len(parts) > 1 and all(map(whole, parts)):
                return parts
    return [one]


def whole(item: Item) -> bool:
    """Return whether an item is a known shape or a word."""
    return not (isinstance(item.thing, Object) and item.thing.shape == UNKNOWN)


def _thing(mask: np.ndarray, colour: str) -> Item:
    """Return the thing of a mask (H, W): letters, if it has no shape and letters can be read."""
    height, width = mask.shape
    shape, pattern, x, y, radius = _fit(mask)
    letters = ""
    if shape == UNKNOWN and (line := _read(mask)):
        letters, x, y = line
    x, y, radius = float(x / width), float(y / height), float(radius / min(width, height))
    place = nearest_place(x, y)
    if letters:
        return Item(Word(letters, colour, place), x, y, 0.0)
    size = min(SIZES, key=lambda size: abs(np.log(SIZES[size] / radius)))
    return Item(Object(shape, colour, size, pattern, place), x, y, radius)


# ---------------------------------------------------------------- shapes and patterns


def _fit(mask: np.ndarray) -> tuple[str, str, float, float, float]:
    """Return the shape, pattern, centre and radius (in pixels) of a mask.

    The shape is the one whose outline, with the same centre of mass and area, overlaps best. The
    pattern is the one with which this shape overlaps best.
    """
    (height, width), short = mask.shape, min(mask.shape)
    window = _window(mask, round(PERIOD * short))
    mask, (top, left) = mask[window], (side.start for side in window)
    outline = _closed(mask, short)
    x, y, area = _moments(outline)

    def drawn(shape: str, x: float, y: float, radius: float, pattern: str = "") -> np.ndarray:
        return coverage(shape, left + x, top + y, radius, width, height, pattern)[window] > 0.5

    guesses = []
    for shape in SHAPES:
        _, mx, my, unit_area = _stencil(shape)
        radius = np.sqrt(area / unit_area)
        guesses.append((shape, x - mx * radius, y - my * radius, radius))
    fits = []
    for shape, fx, fy, radius in sorted(guesses, key=lambda guess: _likeness(outline, *guess))[-2:]:
        for _ in range(2):  # match centre of mass and area, which closing has moved a little
            tx, ty, covered = _moments(_closed(drawn(shape, fx, fy, radius), short))
            fx, fy, radius = fx + x - tx, fy + y - ty, radius * np.sqrt(area / covered)
        template = _closed(drawn(shape, fx, fy, radius), short)
        fits.append((_overlap(outline, template), shape, fx, fy, radius, template))
    _, shape, x, y, radius, template = max(fits, key=lambda fit: fit[0])

    patterns = {pattern: drawn(shape, x, y, radius, pattern) for pattern in ("", *PATTERN)}
    pattern = max(patterns, key=lambda pattern: _overlap(mask, patterns[pattern]))
    if _fills_squares(mask ^ patterns[pattern], short):
        pattern = UNKNOWN
    if _fills_squares(outline ^ template, short):
        shape = UNKNOWN
    return shape, pattern, left + x, top + y, radius


_STEP = 1 / 25  # of a stencil, in radii
# points of a stencil along one axis, from -1.26 to 1.26: no shape reaches further
_POINTS = ((np.arange(64) - 31.5) * _STEP).astype(np.float32)


@cache
def _stencil(shape: str) -> tuple[np.ndarray, float, float, float]:
    """Return which points of a grid are in a shape of radius 1, its centre of mass, its area."""
    inside = DISTANCES[shape](*np.meshgrid(_POINTS, _POINTS)) < 0
    x, y, count = _moments(inside)
    return inside, (x - 32) * _STEP, (y - 32) * _STEP, count * _STEP**2


def _likeness(outline: np.ndarray, shape: str, x: float, y: float, radius: float) -> float:
    """Return how well an outline, sampled at the points of a shape's stencil, overlaps it."""
    pixels = (
        (at + _POINTS * radius).astype(int).clip(0, n - 1)
        for at, n in zip((y, x), outline.shape, strict=True)
    )
    return _overlap(outline[np.ix_(*pixels)], _stencil(shape)[0])


# ---------------------------------------------------------------- letters

# (26, 7, 6): each letter with the gap behind it
_CELLS = np.pad(np.stack(list(GLYPHS.values())), ((0, 0), (0, 0), (0, 1)))
_AMISS = 3.5  # wrong squares, of the 42 of a cell, from which on a letter is UNKNOWN


def _read(mask: np.ndarray) -> tuple[str, float, float] | None:
    """Return the letters of a line, and its middle (x, y) in pixels; None if none can be read."""
    unit = max(1, round(UNIT * min(mask.shape)))
    rows, columns = _window(mask, 0)
    high, wide = (side.stop - side.start for side in (rows, columns))
    # the outermost letters may leave up to three columns free
    count = int(np.ceil((wide / unit + 1) / 6 - 0.2))
    if not (6 < high / unit < 8 and 1 <= count <= 4):
        return None
    page = np.pad(mask, 4 * unit).astype(np.float32)  # room for a line that begins outside
    reads = []
    for y in range(rows.start - unit // 2, rows.start + unit // 2 + 1):
        for x in range(columns.start - 3 * unit, columns.start + unit // 2 + 1):
            line = page[y + 4 * unit :, x + 4 * unit :][: 7 * unit, : 6 * count * unit]
            if line.shape == (7 * unit, 6 * count * unit):
                squares = line.reshape(7, unit, count, 6, unit).mean((1, 4))  # (7, count, 6)
                squares = squares.transpose(1, 0, 2)  # (count, 7, 6)
                reads.append((np.abs(squares[:, None] - _CELLS).sum((2, 3)), x, y))  # (count, 26)
    amiss, x, y = min(reads, key=lambda read: read[0].min(1).sum())
    letters = ""
    for row in amiss:
        letters += list(GLYPHS)[row.argmin()] if row.min() < _AMISS else UNKNOWN
    if letters == UNKNOWN * count:
        return None
    return letters, x + (6 * count - 1) * unit / 2, y + 3.5 * unit


# ---------------------------------------------------------------- masks (H, W)


def _moments(mask: np.ndarray) -> tuple[float, float, int]:
    """Return the centre of mass (x, y) and the area in pixels. An empty mask has the area 1."""
    ys, xs = np.nonzero(mask)
    return (xs.mean() + 0.5, ys.mean() + 0.5, len(xs)) if len(xs) else (0.0, 0.0, 1)


def _split(mask: np.ndarray, outline: np.ndarray) -> list[np.ndarray]:
    """Return the parts (H, W) of a mask between empty columns of its outline, else empty rows."""
    for axis in (1, 0):
        covered = np.any(outline, axis=1 - axis)
        starts = np.flatnonzero(np.diff(covered.astype(int), prepend=0) == 1)
        if len(starts) > 1:
            ends = [*starts[1:], mask.shape[axis]]
            index = np.arange(mask.shape[axis])
            index = index if axis == 1 else index[:, None]
            spans = zip(starts, ends, strict=True)
            parts = [mask & (start <= index) & (index < end) for start, end in spans]
            return [part for part in parts if _fills_squares(part, min(mask.shape))]
    return [mask]


def _window(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Return the rows and columns that the mask covers, with a margin."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return _span(rows, margin), _span(columns, margin)


def _span(indices: np.ndarray, margin: int) -> slice:
    return slice(max(0, indices[0] - margin), indices[-1] + 1 + margin)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over the union."""
    return float((a & b).sum() / (a | b).sum())


def _fills_squares(mask: np.ndarray, short: int) -> bool:
    """Return whether the mask is more than a speck, and not only thin lines."""
    least = 0.0004 * short**2
    return bool(mask.sum() > least and _full(mask, _square(short)).sum() > least)


def _tidy(mask: np.ndarray) -> np.ndarray:
    """Remove pixels far from any filled square: blends along the edges of other things.

    The rim of a thing with a pattern stays.
    """
    short = min(mask.shape)
    return mask & _near(_full(mask, _square(short)), round(2 * PERIOD * short))


def _square(short: int) -> int:
    """Return the side of a square that fits into a pattern's bands, but not into a blended edge."""
    return max(2, round(short / 50))


def _closed(mask: np.ndarray, short: int) -> np.ndarray:
    """Close the gaps of a pattern."""
    side = round(PERIOD * 0.7071 * short) + 2  # the widest gap, and its edges
    side += 1 - side % 2
    return _full(_near(np.pad(mask, side), side), side)[side:-side, side:-side]


def _full(mask: np.ndarray, side: int) -> np.ndarray:
    """Return the pixels around which a square of this side is in the mask."""
    return _count(mask, side) == side**2


def _near(mask: np.ndarray, side: int) -> np.ndarray:
    """Return the pixels around which a square of this side touches the mask."""
    return _count(mask, side) > 0


def _count(mask: np.ndarray, side: int) -> np.ndarray:
    """Return how many pixels of the mask a square around each pixel holds."""
    padded = np.pad(mask, ((side // 2 + 1, side - side // 2 - 1),) * 2)
    sums = padded.astype(np.int32).cumsum(0).cumsum(1)
    return sums[side:, side:] - sums[side:, :-side] - sums[:-side, side:] + sums[:-side, :-side]
