"""What networks show of images, as arrays, and pictures of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import STYLE, palette

_SIDE = 0.95
"""Inches of an image."""
_BORDER: dict[str, Any] = {"colors": "#00E060", "linewidths": 1.0}


@dataclass(frozen=True)
class Attended:
    """What one network attends to, of the images that are shown."""

    name: str
    maps: Float[np.ndarray, "R P"]
    """The best head's attention, or where nothing is marked in images the mean over heads."""
    jaccards: Float[np.ndarray, "R"] | None
    """Of that head with the objects of each image that is shown, in percent; NaN without an object."""
    mean_jaccard: float | None
    """Over all images that are evaluated."""


@dataclass(frozen=True)
class Slide:
    """Networks side by side, on the same images."""

    images: UInt8[np.ndarray, "R S S 3"]
    masks: UInt8[np.ndarray, "R S S"] | None
    networks: tuple[Attended, ...]


@dataclass(frozen=True)
class Prototype:
    """A prototype, what part of the images choose it, and the images that are nearest to it."""

    number: int
    share: float
    nearest: UInt8[np.ndarray, "n S S 3"]


@dataclass(frozen=True)
class ClassMeans:
    """Features of length 1 in the plane in which the means of their classes differ most."""

    points: Float[np.ndarray, "N 2"]
    labels: np.ndarray
    means: Float[np.ndarray, "C 2"]
    names: tuple[str, ...]
    explained: float
    """Part of the means' variance that lies in this plane."""


def attention(slide: Slide) -> Figure:
    """A row for each image: itself, then what each network attends to, with the object's border and the Jaccard index.

    A map is drawn from none to its own largest. Above a column is the mean index over all images that are evaluated,
    or that the map is a mean of heads, as no objects are marked.
    """
    rows, columns = len(slide.images), 1 + len(slide.networks)
    with style.context(STYLE):
        figure = Figure(figsize=(_SIDE * columns, _SIDE * 1.16 * rows + 0.35))
        grid = np.atleast_2d(figure.subplots(rows, columns, squeeze=False))
        for row, image in enumerate(slide.images):
            _show(grid[row, 0], image)
            _outline(grid[row, 0], slide, row)
            for axes, network in zip(grid[row, 1:], slide.networks, strict=True):
                side = math.isqrt(network.maps.shape[1])
                _show(axes, network.maps[row].reshape(side, side), cmap="inferno", vmin=0, extent=_extent(image))
                _outline(axes, slide, row)
                if network.jaccards is not None:
                    percent = network.jaccards[row]
                    axes.set_xlabel("no object" if math.isnan(percent) else f"{percent:.0f} %", labelpad=1)
        grid[0, 0].set_title("image", loc="center")
        for axes, network in zip(grid[0, 1:], slide.networks, strict=True):
            told = "mean of heads" if network.mean_jaccard is None else f"{network.mean_jaccard:.1f} %"
            axes.set_title("\n".join([*network.name.split(" "), told]), loc="center")
    return figure


def prototypes(found: Sequence[Prototype]) -> Figure:
    """A row for each prototype: its number, what part of the images choose it, and the images nearest to it."""
    rows, columns = len(found), max(len(each.nearest) for each in found)
    with style.context(STYLE):
        figure = Figure(figsize=(_SIDE * columns + 0.6, _SIDE * rows))
        grid = figure.subplots(rows, columns, squeeze=False)
        for line, each in zip(grid, found, strict=True):
            for axes, image in zip(line, each.nearest, strict=True):
                _show(axes, image)
            line[0].set_ylabel(f"{each.number}\n{100 * each.share:.1f} %", rotation=0, labelpad=14, va="center")
    return figure


def class_means(found: ClassMeans) -> Figure:
    """Images as small points in the colour of their class, and the name of each class at its mean."""
    colors = palette(len(found.names))
    with style.context(STYLE):
        figure = Figure(figsize=(4, 3.4))
        axes = figure.subplots()
        for label, (name, color) in enumerate(zip(found.names, colors, strict=True)):
            of_class = found.points[found.labels == label]
            axes.scatter(of_class[:, 0], of_class[:, 1], s=3, color=color, linewidths=0)
            axes.annotate(name, found.means[label], ha="center", va="center", fontweight="bold")
        axes.set_xlabel("first principal component of class means")
        axes.set_ylabel("second")
        axes.set_title(f"{100 * found.explained:.0f} % of the class means' variance")
        axes.set_aspect("equal", adjustable="datalim")
    return figure


def _show(axes: Axes, image: Any, **options: Any) -> None:
    axes.imshow(image, interpolation="nearest", **options)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _extent(image: Any) -> tuple[float, float, float, float]:
    """That of the image itself, for what has fewer pixels."""
    return (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)


def _outline(axes: Axes, slide: Slide, row: int) -> None:
    """Around the objects of an image, if somebody marked them."""
    if slide.masks is not None:
        inside = (slide.masks[row] > 0) & (slide.masks[row] < 255)
        if inside.any() and not inside.all():
            axes.contour(inside, levels=[0.5], **_BORDER)
