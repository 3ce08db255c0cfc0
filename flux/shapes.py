"""The world of the embedded toy model: a grammar of captions, the drawing of a scene, and the check of a picture against it.

    caption    = objects [" on " a colour " background"]
    objects    = object [" " place] | object " " relation " " object
    object     = a [size " "] colour " " shape
    a          = "an " before "orange" | "a "
    size       = "small" | "large"
    shape      = "circle" | "square" | "triangle" | "star" | "ring" | "cross"
    colour     = "red" | "orange" | "yellow" | "green" | "blue" | "purple" | "pink" | "white" | "gray" | "black"
    place      = "in the center" | "at the " ("top" | "bottom" | "left" | "right" | "top left" | "top right" | ...)
    relation   = "above" | "below" | "to the left of" | "to the right of"

What a caption leaves out is drawn at random. Nothing here learns or guesses: `draw` renders signed distances, and `check`
measures a picture with thresholds, so that the same picture always gets the same verdict.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {
    "red": (215, 35, 35), "orange": (250, 140, 20), "yellow": (250, 225, 50), "green": (40, 150, 60), "blue": (35, 75, 215),
    "purple": (125, 45, 165), "pink": (250, 150, 190), "white": (250, 250, 250), "gray": (130, 130, 130), "black": (15, 15, 15),
}  # fmt: skip
SIZES = {"small": 0.14, "large": 0.2}  # radius over the shorter side of the picture
GRID = 8  # centres lie on this grid, in pixels: half a token, so that there are few ways for an edge to cross one
ROWS = {"top": 0.26, "": 0.5, "bottom": 0.74}  # centres, over the height
COLUMNS = {"left": 0.26, "": 0.5, "right": 0.74}  # centres, over the width
PLACES = {f"{row} {column}".strip(): (row, column) for row in ROWS for column in COLUMNS}  # "" is the centre
ATTRIBUTES = ("background", "colour", "shape", "size", "place", "relation")
RELATIONS = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}  # first minus second


def a(words: str) -> str:
    """With the indefinite article that they ask for."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


@dataclass(frozen=True)
class Object:
    """One thing in a picture; None where the caption does not say."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None

    def __str__(self) -> str:
        words = [self.size, self.colour, self.shape]
        if self.place is not None:
            words.append(f"at the {self.place}" if self.place else "in the center")
        return a(" ".join(w for w in words if w))


@dataclass(frozen=True)
class Scene:
    """What a caption says: one object, or two in a relation, on a background."""

    objects: tuple[Object, ...]
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        text = f" {self.relation} ".join(map(str, self.objects))
        return text + (f" on {a(self.background)} background" if self.background else "")

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """The attribute combinations that can be held out of training: each (colour, shape, background) that is named."""
        return [(o.colour, o.shape, self.background or "") for o in self.objects]


def random_scene(rng: np.random.Generator, complete: bool = False) -> Scene:
    """A scene from the grammar. `complete`: every attribute is named, as the scoring prompts do."""
    said = lambda chance: complete or rng.random() < chance  # noqa: E731
    pair = rng.random() < 0.55
    colours = list(rng.permutation(list(COLOURS)))[:3]
    objects = tuple(
        Object(str(rng.choice(list(SHAPES))), str(colour), str(rng.choice(list(SIZES))) if said(0.7) else None)
        for colour in colours[: 1 + pair]
    )
    if not pair and said(0.75):
        objects = (replace(objects[0], place=str(rng.choice(list(PLACES)))),)
    relation = str(rng.choice(list(RELATIONS))) if pair else None
    return Scene(objects, relation, str(colours[2]) if said(0.9) else None)


def held_out(scene: Scene) -> bool:
    """One in twelve (colour, shape, background) combinations is never trained on; fixed by arithmetic, not by chance."""
    colours, shapes = list(COLOURS), list(SHAPES)
    return any((colours.index(c) + 3 * shapes.index(s) + 7 * colours.index(b)) % 12 == 0 for c, s, b in scene.combinations if b)


def scenes(seed: int, held: bool | None, complete: bool = False) -> Iterator[Scene]:
    """Endless scenes: those held out of training (True), the others (False), or all (None)."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng, complete)
        if held is None or held_out(scene) == held:
            yield scene


# ---------------------------------------------------------------- drawing


def polygon(*points: tuple[float, float]):
    """Signed distance to a polygon (negative inside), at x, y in units of its radius."""
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
    """`count` corners at equal angles from the top, with the given radii in turn."""
    turns = 2 * np.pi * np.arange(count) / count
    return [(radii[i % len(radii)] * np.sin(a), -radii[i % len(radii)] * np.cos(a)) for i, a in enumerate(turns)]


_ARM, _TIP = 0.33, 1.0
_QUARTER = [(_ARM, -_TIP), (_ARM, -_ARM), (_TIP, -_ARM)]
SHAPES = {  # name: signed distance, in units of the radius, with the centre of mass at the origin
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "square": polygon((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": polygon(*wheel(3, 1.2)),
    "star": polygon(*wheel(10, 1.2, 0.5)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.77) - 0.23,
    "cross": polygon(*[(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in _QUARTER]),
}


def coverage(shape: str, x: float, y: float, radius: float, width: int, height: int) -> np.ndarray:
    """How much of each pixel a shape covers, (H, W) in [0, 1]: a one-pixel ramp across the edge."""
    reach = 1.2 * radius + 2  # nothing reaches further, so only this window is computed
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 1)
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 1)
    covered = np.zeros((height, width), np.float32)
    if left < right and top < bottom:
        ys, xs = np.mgrid[top:bottom, left:right].astype(np.float32) + 0.5
        distance = SHAPES[shape]((xs - x) / radius, (ys - y) / radius) * radius
        covered[top:bottom, left:right] = np.clip(0.5 - distance, 0, 1)
    return covered


def draw(scene: Scene, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of a scene, (H, W, 3) uint8; what the scene leaves open is drawn from `rng`."""
    short = min(width, height)
    taken = [o.colour for o in scene.objects]
    background = scene.background or str(rng.choice([c for c in COLOURS if c not in taken]))
    picture = np.broadcast_to(np.float32(COLOURS[background]), (height, width, 3))
    for item, (cx, cy) in zip(scene.objects, _centres(scene, rng), strict=True):
        radius = SIZES[item.size or str(rng.choice(list(SIZES)))] * short
        reach = 1.2 * radius  # of the longest points: they stay inside
        x, y = (GRID * round(np.clip(c * n, reach, n - reach) / GRID) for c, n in ((cx, width), (cy, height)))
        alpha = coverage(item.shape, x, y, radius, width, height)[..., None]
        picture = picture * (1 - alpha) + np.float32(COLOURS[item.colour]) * alpha
    return np.rint(picture).astype(np.uint8)


def _centres(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Where the objects are, as fractions of width and height."""
    if scene.relation is None:
        row, column = PLACES[scene.objects[0].place if scene.objects[0].place is not None else str(rng.choice(list(PLACES)))]
        return [(COLUMNS[column] + rng.uniform(-0.06, 0.06), ROWS[row] + rng.uniform(-0.06, 0.06))]
    dx, dy = RELATIONS[scene.relation]
    across = rng.uniform(0.36, 0.64)
    centres = []
    for sign in (1, -1):
        along, beside = 0.5 + sign * (dx + dy) * 0.25, across + rng.uniform(-0.04, 0.04)
        centres.append((along, beside) if dx else (beside, along))
    return centres


# ---------------------------------------------------------------- checking


def check(picture: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Measure a picture (H, W, 3) uint8 against a scene: attribute -> right or wrong, and `all`.

    A pixel belongs to the nearest palette colour. Colours count where they fill 3x3 neighbourhoods, so that the blends along
    an edge do not. An object is what has its colour: its shape is the template that overlaps best at the same centre of mass
    and area, its size and place follow from the fit.
    """
    height, width = picture.shape[:2]
    names = list(COLOURS)
    labels = np.square(picture[:, :, None].astype(np.int32) - np.array(list(COLOURS.values()))).sum(-1).argmin(-1)  # (H, W)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    background = names[np.bincount(border, minlength=len(names)).argmax()]
    wanted = {o.colour for o in scene.objects}
    least = 0.0025 * min(width, height) ** 2
    found = {c for i, c in enumerate(names) if c != background and _core(labels == i).sum() > least}

    fits = {c: _fit(labels == names.index(c)) for c in wanted & found}
    right = {"background": scene.background in (None, background), "colour": wanted == found}
    pairs = [(o, fits.get(o.colour)) for o in scene.objects]
    right["shape"] = all(f is not None and f.shape == o.shape for o, f in pairs)
    right["size"] = all(f is not None and o.size in (None, f.size) for o, f in pairs)
    right["place"] = all(f is not None and o.place in (None, f.place) for o, f in pairs)
    if scene.relation:
        dx, dy = RELATIONS[scene.relation]
        a, b = (f for _, f in pairs)
        # the offset must lie along the relation's axis, and be clearly longer there than across
        right["relation"] = bool(
            a and b and (a.x - b.x) * dx + (a.y - b.y) * dy > 1.3 * abs((a.x - b.x) * dy + (a.y - b.y) * dx)
        )
    right["all"] = all(right.values())
    return right


def score(pictures: Iterable[np.ndarray], scenes: Iterable[Scene]) -> dict[str, float]:
    """The share of pictures that are right, attribute by attribute (where a scene has it), and in all."""
    checks = [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return {k: float(np.mean([c[k] for c in checks if k in c])) for k in (*ATTRIBUTES, "all")}


@dataclass(frozen=True)
class Fit:
    shape: str
    size: str
    place: str
    x: float  # centre of mass, in pixels
    y: float


def _fit(mask: np.ndarray) -> Fit:
    height, width = mask.shape
    mask = _opened(mask)  # drops the blends along other objects' edges
    ys, xs = np.nonzero(mask)
    x, y, area = xs.mean() + 0.5, ys.mean() + 0.5, len(xs)
    best = (-1.0, "", 0.0)
    for shape, unit_area in AREAS.items():
        radius = float(np.sqrt(area / unit_area))
        template = _opened(coverage(shape, x, y, radius, width, height) > 0.5)
        overlap = (template & mask).sum() / (template | mask).sum()
        best = max(best, (float(overlap), shape, radius))
    _, shape, radius = best
    middle = np.sqrt(SIZES["small"] * SIZES["large"]) * min(width, height)
    row = min(ROWS, key=lambda k: abs(ROWS[k] - y / height))
    column = min(COLUMNS, key=lambda k: abs(COLUMNS[k] - x / width))
    return Fit(shape, "small" if radius < middle else "large", f"{row} {column}".strip(), x, y)


def _opened(mask: np.ndarray) -> np.ndarray:
    """What lies within two pixels of the mask's core: thin lines vanish, corners stay."""
    return mask & _neighbourhood(_neighbourhood(_core(mask), np.any), np.any)


def _core(mask: np.ndarray) -> np.ndarray:
    """The pixels whose whole 3x3 neighbourhood is in the mask."""
    return _neighbourhood(mask, np.all)


def _neighbourhood(mask: np.ndarray, combine) -> np.ndarray:
    """All (or any) of each pixel's 3x3 neighbourhood; pixels beyond the border count as outside."""
    padded = np.pad(mask, 1)
    rows = combine([padded[:-2], padded[1:-1], padded[2:]], axis=0)  # (H, W + 2)
    return combine([rows[:, :-2], rows[:, 1:-1], rows[:, 2:]], axis=0)


AREAS = {shape: float(coverage(shape, 200, 200, 100, 400, 400).sum()) / 100**2 for shape in SHAPES}  # at radius 1

WORDS = set(" ".join([*SHAPES, *COLOURS, *SIZES, *PLACES, *RELATIONS, "a an the at in on center background"]).split())


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that the grammar lacks, in order."""
    words = (w.strip(".,;:!?\"'()").lower() for w in prompt.split())
    return list(dict.fromkeys(w for w in words if w and w not in WORDS))
