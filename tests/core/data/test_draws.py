"""What is drawn for crops: how often, between which bounds, and for whom."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomErasing, RandomResizedCrop

from dino_lab.core.data.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, View, draw
from dino_lab.core.settings import KnobError

MANY = 20_000


def drawn_for(view: View, height: int = 256, width: int = 256, *, images: int = MANY, size: int = 32) -> Draws:
    """Three crops of many images of one size."""
    heights, widths = np.full(images, height), np.full(images, width)
    return draw(view, np.arange(images), np.arange(3), seed=5, epoch=0, heights=heights, widths=widths, size=size)


def evenly(sample: np.ndarray, low: float, high: float) -> None:
    assert low <= sample.min()
    assert sample.max() <= high
    assert stats.kstest(sample, "uniform", args=(low, high - low)).pvalue > 1e-3


def often(sample: np.ndarray, probability: float) -> None:
    assert stats.binomtest(int(sample.sum()), sample.size, probability).pvalue > 1e-3


def test_area_and_log_ratio_are_even_between_their_bounds() -> None:
    # Boxes of up to 0.4 of the area fit at the first try; of a large image, so that rounding does not show.
    drawn = drawn_for(View(scale=(0.05, 0.4)), 100_000, 100_000)
    _, _, height, width = np.moveaxis(drawn.boxes.astype(np.float64), -1, 0)
    slack = 1e-3
    area, ratio = height * width / 1e10, np.log(width / height)
    for crop in range(3):
        assert stats.kstest(area[:, crop], "uniform", args=(0.05, 0.35)).pvalue > 1e-3
        bound = np.log(4 / 3)
        assert stats.kstest(ratio[:, crop], "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3
    assert area.min() > 0.05 - slack
    assert area.max() < 0.4 + slack


@pytest.mark.parametrize(
    ("scale", "ratio", "height", "width"),
    [
        ((0.4, 1.0), (3 / 4, 4 / 3), 256, 256),
        ((0.4, 1.0), (3 / 4, 4 / 3), 200, 320),
        ((0.7, 1.0), (1 / 2, 2.0), 320, 150),
        ((0.05, 0.4), (3 / 4, 4 / 3), 32, 32),
    ],
)
def test_boxes_are_distributed_as_torchvisions(
    scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int
) -> None:
    ours = drawn_for(View(scale=scale, ratio=ratio), height, width).boxes[:, 0]
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(4000)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    # Every place that a box can have, the last pixel included.
    assert (ours[:, 0] + ours[:, 2]).max() == height
    assert (ours[:, 1] + ours[:, 3]).max() == width
    assert ours[:, :2].min() == 0


@pytest.mark.parametrize(("ratio", "height", "width"), [((3.0, 4.0), 40, 1), ((0.1, 0.2), 1, 40)])
def test_a_box_has_at_least_a_pixel_whatever_is_asked_for(ratio: tuple[float, float], height: int, width: int) -> None:
    boxes = drawn_for(View(ratio=ratio), height, width, images=50).boxes
    assert (boxes[..., 2:] >= 1).all()
    assert (boxes[..., 0] + boxes[..., 2] <= height).all()
    assert (boxes[..., 1] + boxes[..., 3] <= width).all()


@pytest.mark.parametrize(
    ("ratio", "height", "width"),
    [((3.0, 4.0), 40, 32), ((0.1, 0.2), 40, 32), ((0.75, 1.25), 40, 41), ((1.0, 1.0), 9, 9)],
)
def test_where_no_try_fits_the_box_is_torchvisions_central_one(
    ratio: tuple[float, float], height: int, width: int
) -> None:
    view = View(scale=(1.0, 1.0), ratio=ratio)
    boxes = drawn_for(view, height, width, images=500).boxes.reshape(-1, 4)
    image = torch.zeros(3, height, width)
    theirs = Counter(RandomResizedCrop.get_params(image, [1.0, 1.0], list(ratio)) for _ in range(100))
    # A try that is rounded down to fit is rare, not impossible.
    ours = Counter(tuple(box) for box in boxes.tolist())
    assert ours.most_common(1)[0][0] == theirs.most_common(1)[0][0]
    assert ours.most_common(1)[0][1] > 0.9 * len(boxes)


def test_images_of_many_sizes_get_the_boxes_that_each_alone_would_get() -> None:
    indices, heights, widths = np.arange(50), np.arange(1, 51), np.arange(100, 0, -2)

    def boxes(chosen: slice) -> np.ndarray:
        return draw(
            View(),
            indices[chosen],
            np.arange(3),
            seed=0,
            epoch=0,
            heights=heights[chosen],
            widths=widths[chosen],
            size=8,
        ).boxes

    together = boxes(slice(None))
    for image in range(50):
        assert np.array_equal(together[image : image + 1], boxes(slice(image, image + 1)))
        top, left, height, width = together[image].T
        assert (height >= 1).all()
        assert (width >= 1).all()
        assert (top + height <= heights[image]).all()
        assert (left + width <= widths[image]).all()


def test_each_operation_is_drawn_with_its_probability() -> None:
    probabilities = {
        "flip": 0.4,
        "jitter": 0.8,
        "grayscale": 0.2,
        "blur": 0.1,
        "solarize": 0.05,
        "rotation": 0.3,
        "noise": 0.6,
        "erasing": 0.7,
    }
    drawn = drawn_for(View.of({f"{name}_probability": value for name, value in probabilities.items()}))
    for name, probability in probabilities.items():
        mask = getattr(drawn, {"rotation": "rotate", "erasing": "erase"}.get(name, name))
        for crop in range(3):
            often(mask[:, crop], probability)


def test_strengths_are_even_between_their_bounds() -> None:
    view = View(contrast=1.5, blur_sigma=(0.3, 1.2), rotation_probability=0.5, rotation_degrees=40.0)
    drawn = drawn_for(view)
    for crop in range(3):
        evenly(drawn.factors[:, crop, BRIGHTNESS], 0.6, 1.4)
        evenly(drawn.factors[:, crop, CONTRAST], 0.0, 2.5)
        evenly(drawn.factors[:, crop, SATURATION], 0.8, 1.2)
        evenly(drawn.factors[:, crop, HUE], -0.1, 0.1)
        evenly(drawn.sigma[:, crop], 0.3, 1.2)
        evenly(drawn.angle[:, crop], -40.0, 40.0)


@pytest.mark.parametrize(("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.5, 0.9), (0.2, 5.0))])
def test_erased_rectangles_are_distributed_as_torchvisions(
    scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    view = View(erasing_probability=1.0, erasing_scale=scale, erasing_ratio=ratio)
    drawn = drawn_for(view, size=64)
    torch.manual_seed(0)
    crop = torch.zeros(3, 64, 64)
    found = [RandomErasing.get_params(crop, scale, ratio, value=[0.0])[:4] for _ in range(4000)]
    # Where no try fits it gives the whole crop, and erases nothing of it.
    theirs = np.array([box for box in found if box[2:] != (64, 64)])
    erase = drawn.erase[:, 0]
    assert stats.fisher_exact([[erase.sum(), (~erase).sum()], [len(theirs), len(found) - len(theirs)]]).pvalue > 1e-3
    ours = drawn.erased[erase, 0]
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2]).max() == 64
    assert (ours[:, 1] + ours[:, 3]).max() == 64


def test_what_is_not_the_references_changes_nothing_of_what_is() -> None:
    plain = vars(drawn_for(View()))
    extra = vars(drawn_for(View(rotation_probability=0.5, noise_probability=0.5, erasing_probability=0.5)))
    for name in plain.keys() - {"rotate", "angle", "noise", "noise_seed", "erase", "erased"}:
        assert np.array_equal(plain[name], extra[name]), name
    assert not plain["rotate"].any()
    assert not plain["noise"].any()
    assert not plain["erase"].any()


def test_noise_has_a_seed_for_every_crop() -> None:
    seeds = drawn_for(View(noise_probability=0.1)).noise_seed
    assert len(np.unique(seeds)) > 0.99 * seeds.size


def test_every_order_of_jitter_is_equally_likely() -> None:
    for crop in range(2):
        counts = np.unique(drawn_for(View()).order[:, crop], axis=0, return_counts=True)[1]
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue > 1e-3
    two = drawn_for(View(brightness=0.0, saturation=0.0)).order[:, 0]
    assert set(map(tuple, two.tolist())) == {(CONTRAST, HUE), (HUE, CONTRAST)}
    often(two[:, 0] == HUE, 0.5)


def test_draws_of_a_crop_and_of_two_crops_are_uncorrelated() -> None:
    even = ("blur", "solarize", "rotation", "noise", "erasing")
    drawn = drawn_for(View.of({f"{name}_probability": 0.5 for name in even}))
    columns = [
        np.concatenate(
            [
                drawn.boxes[:, crop],
                drawn.factors[:, crop],
                np.stack(
                    [
                        drawn.flip[:, crop],
                        drawn.jitter[:, crop],
                        drawn.order[:, crop, 0] == HUE,
                        drawn.grayscale[:, crop],
                        drawn.blur[:, crop],
                        drawn.sigma[:, crop],
                        drawn.solarize[:, crop],
                        drawn.rotate[:, crop],
                        drawn.angle[:, crop],
                        drawn.noise[:, crop],
                        drawn.noise_seed[:, crop],
                        drawn.erase[:, crop],
                    ],
                    axis=1,
                ),
            ],
            axis=1,
        )
        for crop in range(2)
    ]
    correlation = np.abs(np.corrcoef(np.concatenate(columns, axis=1), rowvar=False))
    # Place and size of one box belong together; each of the rest is on its own.
    for start in (0, 20):
        correlation[start : start + 4, start : start + 4] = 0
    np.fill_diagonal(correlation, 0)
    assert correlation.max() < 4.5 / np.sqrt(MANY)


# ------------------------------------------------------------------------------------------------------- its knobs


def test_defaults_are_the_references() -> None:
    assert View().flat() == {
        "scale": [0.4, 1.0],
        "ratio": [3 / 4, 4 / 3],
        "interpolation": "bicubic",
        "flip_probability": 0.5,
        "rotation_probability": 0.0,
        "rotation_degrees": 30.0,
        "jitter_probability": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "grayscale_probability": 0.2,
        "blur_probability": 0.5,
        "blur_sigma": [0.1, 2.0],
        "solarize_probability": 0.0,
        "solarize_threshold": 128,
        "noise_probability": 0.0,
        "noise_std": 0.1,
        "erasing_probability": 0.0,
        "erasing_scale": [0.02, 0.33],
        "erasing_ratio": [0.3, 3.3],
    }


@pytest.mark.parametrize(
    ("knob", "value"),
    [("hue", 0.6), ("brightness", -0.1), ("flip_probability", 1.1), ("solarize_threshold", 256), ("noise_std", 0.0)],
)
def test_a_value_out_of_bounds_is_refused(knob: str, value: float) -> None:
    with pytest.raises(KnobError, match=knob):
        View().but({knob: value})
