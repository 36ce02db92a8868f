"""The procedural data set: one textured, coloured shape at a random place over a textured background.

Pure numpy: knobs, split and number in, arrays out. Image i is a function of (knobs, split, i) alone, so a
larger set begins with the smaller one. Caching and tensors are the business of sources.py.
"""

# numpy's ufuncs are typed as returning Any:
# mypy: disable-error-code="no-any-return"

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from pydantic import Field, model_validator

from dino_lab.core.settings import Settings

Split: TypeAlias = Literal["train", "test"]
Plane: TypeAlias = Float32[np.ndarray, "S S"]
Color: TypeAlias = Float32[np.ndarray, "3 1 1"]

DRAWING = 1
"""Version of the drawing: raised whenever the same knobs give other images, so that no stale cache is found."""

FACTORS = ("shape", "color", "texture", "background", "position")


class ShapesKnobs(Settings):
    """What is drawn, and how strongly everything that is not the class varies."""

    kind: Literal["shapes"] = "shapes"
    """Which data set."""
    class_factor: Literal["shape", "color", "texture", "background", "position"] = "color"
    """The factor that is the class; every factor's label is kept beside it."""
    image_size: int = Field(default=48, ge=16, le=256)
    """Side of an image in pixels; everything else scales with it."""
    train_images: int = Field(default=4000, ge=1)
    """Training images."""
    test_images: int = Field(default=1000, ge=1)
    """Held-out images."""
    draw_seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the drawing, apart from the trial's seed."""
    shape_scale: tuple[float, float] = (0.4, 0.6)
    """Smallest and largest diameter of the shape, as a fraction of the image's side; within 0.1 and 0.6."""
    shapes_number: int = Field(default=8, ge=2, le=8)
    """Values of the factor shape."""
    colors_number: int = Field(default=8, ge=2, le=8)
    """Values of the factor color."""
    textures_number: int = Field(default=6, ge=2, le=6)
    """Values of the factor texture, the pattern on the shape."""
    backgrounds_number: int = Field(default=8, ge=2, le=8)
    """Values of the factor background, the pattern behind the shape."""
    color_jitter: float = Field(default=0.5, ge=0, le=1)
    """Spread of hue within a colour: 0 is none, 1 lets neighbouring colours touch."""
    background_saturation: float = Field(default=0.2, ge=0, le=1)
    """Largest saturation of the background's and the clutter's colours, whose hues are random."""
    background_contrast: float = Field(default=0.6, ge=0, le=1)
    """Difference in brightness between the background's two colours, at most."""
    clutter: int = Field(default=3, ge=0, le=50)
    """Small distractor pieces behind the shape."""
    lighting: float = Field(default=0.8, ge=0, le=2)
    """Strength of the light's gain and gradient: at 1, the gradient is up to a factor of four from side to side."""
    noise: float = Field(default=0.03, ge=0, le=0.5)
    """Standard deviation of the noise of each pixel and channel; black is 0, white is 1."""
    color_predicts_class: float = Field(default=0.0, ge=0, le=1)
    """Probability that a training image has the colour of its class, else any; class k's is k modulo colors_number, so
    with more classes than colours some share one."""
    background_predicts_class: float = Field(default=0.0, ge=0, le=1)
    """Probability that a training image has the background of its class, else any; class k's is k modulo
    backgrounds_number, so with more classes than backgrounds some share one."""
    class_imbalance: float = Field(default=1.0, ge=1, le=1000)
    """How many times as many training images the first class has as the last; those between fall off exponentially."""

    @model_validator(mode="after")
    def _scale_in_order(self) -> "ShapesKnobs":
        smallest, largest = self.shape_scale
        if not 0.1 <= smallest <= largest <= 0.6:
            raise ValueError(f"shape_scale = {list(self.shape_scale)}: must be [smallest, largest] within 0.1 and 0.6")
        return self

    @model_validator(mode="after")
    def _class_predicted_by_another_factor(self) -> "ShapesKnobs":
        for factor, probability in self.biases().items():
            if probability > 0 and factor == self.class_factor:
                raise ValueError(
                    f"data.{factor}_predicts_class = {probability}: with data.class_factor = {factor!r} "
                    f"the {factor} is the class; must be 0, or the class another factor"
                )
        return self

    def biases(self) -> dict[str, float]:
        """The factors that may predict the class in training, each with the probability that it does."""
        return {"color": self.color_predicts_class, "background": self.background_predicts_class}

    def factor_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the values of each factor, in the order of their labels."""
        return {
            "shape": tuple(SHAPES)[: self.shapes_number],
            "color": tuple(HUES)[: self.colors_number],
            "texture": tuple(TEXTURES)[: self.textures_number],
            "background": tuple(BACKGROUNDS)[: self.backgrounds_number],
            "position": POSITIONS,
        }


@dataclass(frozen=True)
class Drawn:
    """A drawn split: images, foreground masks (1 on the shape) and a label for each factor."""

    images: UInt8[np.ndarray, "N S S 3"]
    masks: UInt8[np.ndarray, "N S S"]
    labels: dict[str, Int64[np.ndarray, "N"]]


def draw(knobs: ShapesKnobs, split: Split, images_number: int) -> Drawn:
    """The first `images_number` images of a split."""
    labels = draw_labels(knobs, split, images_number)
    images = np.empty((images_number, knobs.image_size, knobs.image_size, 3), np.uint8)
    masks = np.empty((images_number, knobs.image_size, knobs.image_size), np.uint8)
    for i in range(images_number):
        stream = _stream(knobs, split, purpose=len(FACTORS), image=i)
        image, coverage = _draw_image(knobs, stream, {factor: int(labels[factor][i]) for factor in FACTORS})
        images[i] = np.rint(255 * image).transpose(1, 2, 0)
        masks[i] = coverage > 0.5
    return Drawn(images, masks, labels)


def draw_labels(knobs: ShapesKnobs, split: Split, images_number: int) -> dict[str, Int64[np.ndarray, "N"]]:
    """Labels of the first images of a split: each run of n images holds each of a factor's n values once.

    Knobs may skew the training split: classes with a long tail, factors that predict the class. The test split stays
    balanced and its factors independent, so that what is learned from such a factor alone is worth nothing there.

    The long tail holds in expectation: each image's class is drawn, and a rare class may have none.

    Source: of the long tail, Cui et al. (arXiv:1901.05555), section 5.1.
    """
    names_of = knobs.factor_names()
    labels = {}
    for purpose, (factor, names) in enumerate(names_of.items()):
        runs_number = math.ceil(images_number / len(names))
        order = _stream(knobs, split, purpose=purpose).random((runs_number, len(names))).argsort(axis=1)
        labels[factor] = order.reshape(-1)[:images_number].astype(np.int64)
    if split == "test":
        return labels

    # Streams of their own, numbered after those of the factors and of the images: nothing else is drawn otherwise.
    if knobs.class_imbalance > 1:
        places = np.linspace(0, 1, len(names_of[knobs.class_factor]))
        shares = knobs.class_imbalance**-places
        borders = shares.cumsum()[:-1] / shares.sum()
        numbers = _stream(knobs, split, purpose=len(FACTORS) + 1).random(images_number)
        labels[knobs.class_factor] = np.searchsorted(borders, numbers, side="right")
    for purpose, (factor, probability) in enumerate(knobs.biases().items(), start=len(FACTORS) + 2):
        follows = _stream(knobs, split, purpose=purpose).random(images_number) < probability
        labels[factor] = np.where(follows, labels[knobs.class_factor] % len(names_of[factor]), labels[factor])
    return labels


def _stream(knobs: ShapesKnobs, split: Split, *, purpose: int, image: int = 0) -> np.random.Generator:
    """Random numbers of their own for each (seed, split, purpose, image): Philox's counter starts elsewhere."""
    key = (knobs.draw_seed << 8) + (purpose << 1) + (split == "test")
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, image, 0]))


def _draw_image(
    knobs: ShapesKnobs, stream: np.random.Generator, label: dict[str, int]
) -> tuple[Float32[np.ndarray, "3 S S"], Plane]:
    """One image in [0, 1], channels first for speed, and how much of each pixel the shape covers."""
    names = {factor: values[label[factor]] for factor, values in knobs.factor_names().items()}
    size = knobs.image_size
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(ticks, ticks)

    # Background and clutter: hue is free, so that no colour of theirs tells anything.
    middle = stream.uniform(0.3, 0.7)
    half = knobs.background_contrast / 2 * stream.uniform(0.6, 1) * math.copysign(1, stream.random() - 0.5)
    zero, one = (_free_color(knobs, stream, value) for value in (middle - half, middle + half))
    pattern = _pattern(BACKGROUNDS[names["background"]], stream, x, y, period=0.2)
    image = _mix(pattern, zero, one)
    for _ in range(knobs.clutter):
        piece = SHAPES["square" if stream.random() < 0.5 else "disc"]
        radius = stream.uniform(0.02, 0.06)
        coverage = _coverage(piece, x, y, stream.random(), stream.random(), radius, stream.uniform(0, 2 * np.pi))
        image = _mix(coverage, image, _free_color(knobs, stream, stream.random()))

    # The shape, wholly inside the image, its centre in its cell.
    radius = stream.uniform(*knobs.shape_scale) / 2
    row, column = divmod(label["position"], 3)
    center_x, center_y = (
        stream.uniform(max(cell / 3, radius), min((cell + 1) / 3, 1 - radius)) for cell in (column, row)
    )
    angle = stream.uniform(0, 2 * np.pi)
    coverage = _coverage(SHAPES[names["shape"]], x, y, center_x, center_y, radius, angle)
    hue = HUES[names["color"]] + knobs.color_jitter * stream.uniform(-22.5, 22.5)
    saturation = stream.uniform(0.75, 1)
    bright = stream.uniform(0.75, 1)
    deep = bright * stream.uniform(0.3, 0.5)
    pattern = _pattern(TEXTURES[names["texture"]], stream, x, y, period=0.12)
    paint = _mix(pattern, _rgb(hue, saturation, deep), _rgb(hue, saturation, bright))
    image = _mix(coverage, image, paint)

    # Light, then the camera's noise.
    gain, slope_x, slope_y = stream.uniform(-1, 0.4), stream.uniform(-1, 1), stream.uniform(-1, 1)
    image = image * np.exp2(knobs.lighting * (gain + slope_x * (2 * x - 1) + slope_y * (2 * y - 1)))
    image = image + knobs.noise * stream.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 1), coverage


def _coverage(
    distance: "Distance", x: Plane, y: Plane, center_x: float, center_y: float, radius: float, angle: float
) -> Plane:
    """How much of each pixel a placed shape covers, from its signed distance: the edge is one pixel wide."""
    u, v = _turned((x - center_x) / radius, (y - center_y) / radius, angle)
    return np.clip(0.5 - distance(u, v) * (radius * x.shape[0]), 0, 1, dtype=np.float32)


def _pattern(pattern: "Pattern", stream: np.random.Generator, x: Plane, y: Plane, period: float) -> Plane:
    """A pattern in [0, 1] at a random angle and phase, its period within a fifth of the given one."""
    period = period * stream.uniform(0.8, 1.2)
    u, v = _turned(x / period, y / period, stream.uniform(0, 2 * np.pi))
    lattice = stream.random((16, 16), dtype=np.float32)
    shift_u, shift_v = stream.uniform(-4, 4, 2)
    edge = 1 / (period * x.shape[0])
    return pattern(u + np.float32(shift_u), v + np.float32(shift_v), lattice, edge)


def _turned(u: Plane, v: Plane, angle: float) -> tuple[Plane, Plane]:
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * u + sin * v, cos * v - sin * u


def _mix(weight: Plane, zero: np.ndarray, one: np.ndarray) -> Float32[np.ndarray, "3 S S"]:
    return zero + weight * (one - zero)


def _rgb(hue_degrees: float, saturation: float, value: float) -> Color:
    return np.array(colorsys.hsv_to_rgb(hue_degrees / 360 % 1, saturation, value), np.float32)[:, None, None]


def _free_color(knobs: ShapesKnobs, stream: np.random.Generator, value: float) -> Color:
    return _rgb(stream.uniform(0, 360), knobs.background_saturation * stream.random(), value)


# ---- shapes: signed distances, negative inside, in units of the circumscribed radius, centroid at the origin --------

Distance: TypeAlias = Callable[[Plane, Plane], Plane]


def _disc(u: Plane, v: Plane) -> Plane:
    return np.hypot(u, v) - 0.85


def _square(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u), np.abs(v)) - 0.7


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum(0.866 * np.abs(u) + 0.5 * v, -v) - 0.5


def _star(u: Plane, v: Plane) -> Plane:
    # Folded onto half a point: the edge runs from the tip (1, 0) to the notch at 36 degrees.
    radius, turn = np.hypot(u, v), np.arctan2(v, u)
    turn = np.abs((turn + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    notch = 0.45 * np.exp(1j * np.pi / 5)
    edge = (1 - notch) / abs(1 - notch)
    return ((radius * np.cos(turn) - 1) * -edge.imag + radius * np.sin(turn) * edge.real).astype(np.float32)


def _cross(u: Plane, v: Plane) -> Plane:
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(long - 0.93, short - 0.3)


def _ring(u: Plane, v: Plane) -> Plane:
    return np.abs(np.hypot(u, v) - 0.67) - 0.23


def _crescent(u: Plane, v: Plane) -> Plane:
    u = u - 0.264
    return np.maximum(np.hypot(u, v) - 0.8, 0.58 - np.hypot(u - 0.4, v))


def _heart(u: Plane, v: Plane) -> Plane:
    # A square on its corner with a half disc on each of two sides.
    v = v - 0.235
    tip = np.maximum(np.abs(u + v), np.abs(u - v)) * 0.7071 - 0.53
    lobes = np.hypot(np.abs(u) - 0.3748, v + 0.3748) - 0.53
    return np.minimum(tip, lobes)


SHAPES: dict[str, Distance] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
}

HUES = {"red": 0, "green": 135, "blue": 225, "amber": 45, "cyan": 180, "violet": 270, "lime": 90, "magenta": 315}
"""Degrees; the first are the farthest apart."""

POSITIONS = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))


# ---- patterns: (u, v in periods, a lattice of random numbers, a pixel in periods) -> [0, 1] --------------------------

Pattern: TypeAlias = Callable[[Plane, Plane, Plane, float], Plane]


def _step(signed: Plane, edge: float) -> Plane:
    """1 where positive, 0 where negative, with an edge one pixel wide."""
    return np.clip(0.5 + signed / edge, 0, 1, dtype=np.float32)


def _wave(u: Plane) -> Plane:
    """A triangle wave of period 1 between -1/4 and 1/4, positive for half of it."""
    return np.abs(u % 1 - 0.5) - 0.25


def _cell_distance(u: Plane, v: Plane) -> Plane:
    return np.hypot(u % 1 - 0.5, v % 1 - 0.5)


def _smooth_noise(u: Plane, v: Plane, lattice: Plane) -> Plane:
    """Random values at whole (u, v), smoothly interpolated between them."""
    cell_u, cell_v = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    weight_u, weight_v = u - cell_u, v - cell_v
    weight_u, weight_v = weight_u * weight_u * (3 - 2 * weight_u), weight_v * weight_v * (3 - 2 * weight_v)
    near_u, far_u, near_v, far_v = cell_u % 16, (cell_u + 1) % 16, cell_v % 16, (cell_v + 1) % 16
    top = lattice[near_v, near_u] * (1 - weight_u) + lattice[near_v, far_u] * weight_u
    bottom = lattice[far_v, near_u] * (1 - weight_u) + lattice[far_v, far_u] * weight_u
    return (top * (1 - weight_v) + bottom * weight_v).astype(np.float32)


def _plain(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return np.ones_like(u)


def _stripes(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return _step(_wave(u), edge)


def _checks(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    u, v = u * 0.8, v * 0.8
    first, second = _step(_wave(u), edge), _step(_wave(v), edge)
    return first + second - 2 * first * second


def _dots(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return _step(_cell_distance(u, v) - 0.33, edge)


def _net(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return np.minimum(_step(np.abs(u % 1 - 0.5) - 0.15, edge), _step(np.abs(v % 1 - 0.5) - 0.15, edge))


def _speckle(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return _step(_smooth_noise(3 * u, 3 * v, lattice) - 0.5, 3 * edge)


def _clouds(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return np.clip(1.4 * _smooth_noise(u, v, lattice) - 0.2, 0, 1, dtype=np.float32)


def _bands(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return 0.5 + 2 * _wave(u)


def _tiles(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return _step(np.minimum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)) - 0.08, edge)


def _ripples(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return _step(_wave(np.hypot(u, v)), edge)


def _zigzag(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return _step(_wave(u + 2 * _wave(v)), edge)


def _blotches(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return _step(_smooth_noise(1.5 * u, 1.5 * v, lattice) - 0.5, 3 * edge)


def _bubbles(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return _step(0.12 - np.abs(_cell_distance(u, v) - 0.3), edge)


def _bricks(u: Plane, v: Plane, lattice: Plane, edge: float) -> Plane:
    return _step(np.minimum(np.abs(u / 2 + np.floor(v) / 2) % 1, np.abs(v % 1)) - 0.12, edge)


TEXTURES: dict[str, Pattern] = {
    "plain": _plain,
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "speckle": _speckle,
    "net": _net,
}

BACKGROUNDS: dict[str, Pattern] = {
    "clouds": _clouds,
    "zigzag": _zigzag,
    "tiles": _tiles,
    "bubbles": _bubbles,
    "bands": _bands,
    "blotches": _blotches,
    "ripples": _ripples,
    "bricks": _bricks,
}
