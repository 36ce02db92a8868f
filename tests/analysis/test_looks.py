"""Pictures of what networks show: what stands where."""

import numpy as np
import pytest

from analysis import figures, looks
from analysis.looks import Attended, ClassMeans, Prototype, Slide

IMAGES = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
MASKS = np.zeros((2, 8, 8), np.uint8)
MASKS[:, 2:5, 2:6] = 1


def network(name: str, jaccard: float | None) -> Attended:
    maps = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], np.float32)
    return Attended(name, maps, None if jaccard is None else np.array([jaccard, jaccard + 1]), jaccard)


def test_each_network_has_a_column_with_its_index_and_each_image_a_row():
    figure = looks.attention(Slide(IMAGES, MASKS, (network("untrained", 14.2), network("dino abc", 36.6))))
    grid = np.array(figure.axes).reshape(2, 3)
    assert [axes.get_title() for axes in grid[0]] == ["image", "untrained\n14.2 %", "dino\nabc\n36.6 %"]
    assert [axes.get_xlabel() for axes in grid[1]] == ["", "15 %", "38 %"]
    np.testing.assert_array_equal(grid[1, 0].images[0].get_array(), IMAGES[1])
    np.testing.assert_allclose(grid[1, 1].images[0].get_array(), [[0.4, 0.3], [0.2, 0.1]])
    assert grid[0, 1].images[0].get_extent() == grid[0, 0].images[0].get_extent()
    assert all(axes.collections for axes in grid.flat)


def test_without_masks_there_is_neither_border_nor_index():
    figure = looks.attention(Slide(IMAGES, None, (network("dino abc", None),)))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["image", "dino\nabc\nmean of heads"]
    assert not any(axes.get_xlabel() for axes in figure.axes)
    assert not any(axes.collections for axes in figure.axes)


def test_an_image_that_is_all_object_has_no_border():
    figure = looks.attention(Slide(IMAGES, np.ones_like(MASKS), (network("dino abc", 50.0),)))
    assert not any(axes.collections for axes in figure.axes)


def test_an_image_without_an_object_has_no_index():
    masks = np.concatenate([MASKS[:1], np.zeros_like(MASKS[:1])])
    attended = Attended("dino abc", network("", None).maps, np.array([40.0, np.nan]), 40.0)
    figure = looks.attention(Slide(IMAGES, masks, (attended,)))
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "40 %", "", "no object"]


def test_prototypes_are_rows_with_their_share():
    figure = looks.prototypes([Prototype(7, 0.25, IMAGES), Prototype(3, 0.1, IMAGES)])
    assert [axes.get_ylabel() for axes in figure.axes] == ["7\n25.0 %", "", "3\n10.0 %", ""]


def test_classes_are_named_at_their_means():
    points = np.array([[0.0, 1.0], [0.2, 1.0], [1.0, 0.0]])
    found = ClassMeans(points, np.array([0, 0, 1]), np.array([[0.1, 1.0], [1.0, 0.0]]), ("red", "green"), 0.9)
    (axes,) = looks.class_means(found).axes
    assert {text.get_text(): tuple(text.xy) for text in axes.texts} == {"red": (0.1, 1.0), "green": (1.0, 0.0)}
    assert [len(each.get_offsets()) for each in axes.collections] == [2, 1]


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_same_arrays_draw_the_same_bytes(form):
    slide = Slide(IMAGES, MASKS, (network("dino abc", 36.6),))
    assert figures.render(looks.attention(slide), form) == figures.render(looks.attention(slide), form)
