"""Multi-crop: a batch of crops is what a loop over torchvision makes, whoever is in it and however it is made."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dino_lab.core.data import pixels
from dino_lab.core.data.crops import _FIRST_LOCAL, MEAN, STD, Crops, apply, multi_crop, whole
from dino_lab.core.data.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, View, draw
from dino_lab.core.data.pixels import blurred
from dino_lab.core.settings import KnobError

VIEWS = ("global_1", "global_2", "local")
SMALL = Crops(global_crops_size=32, local_crops_size=16, local_crops_number=3)


def everywhere(changes: dict) -> dict:
    """The same knobs of every view."""
    return {f"{view}.{knob}": value for view in VIEWS for knob, value in changes.items()}


OFF = {f"{name}_probability": 0.0 for name in ("flip", "jitter", "grayscale", "blur", "solarize")}
ON = {
    "rotation_probability": 0.5,
    "noise_probability": 0.5,
    "erasing_probability": 0.5,
    "solarize_probability": 0.5,
    "solarize_threshold": 100,
    "interpolation": "bilinear",
}
PLAIN = SMALL.but(everywhere(OFF))


def pictures(number: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (number, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7)
    )


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def normalised(crops: Tensor) -> Tensor:
    return F.normalize(crops, list(MEAN), list(STD))


# -------------------------------------------------------------------------------- together, against a plain loop


def one_crop(image: Tensor, draws: Draws, at: tuple[int, int], view: View, size: int) -> Tensor:
    top, left, height, width = draws.boxes[at].tolist()
    crop = F.resized_crop(
        image.permute(2, 0, 1) / 255,
        top,
        left,
        height,
        width,
        [size, size],
        interpolation=InterpolationMode(view.interpolation),
        antialias=True,
    ).clamp(0, 1)
    if draws.flip[at]:
        crop = F.hflip(crop)
    if draws.rotate[at]:
        crop = F.rotate(crop, draws.angle[at], InterpolationMode.BILINEAR)
    if draws.jitter[at]:
        adjust = {
            BRIGHTNESS: F.adjust_brightness,
            CONTRAST: F.adjust_contrast,
            SATURATION: F.adjust_saturation,
            HUE: F.adjust_hue,
        }
        for operation in draws.order[at]:
            crop = adjust[operation](crop, draws.factors[at][operation])
    if draws.grayscale[at]:
        crop = F.rgb_to_grayscale(crop, num_output_channels=3)
    if draws.blur[at]:
        crop = blurred(crop[None], draws.sigma[at][None])[0]
    if draws.solarize[at]:
        crop = F.solarize(crop, view.solarize_threshold / 255)
    if draws.noise[at]:
        generator = np.random.Generator(np.random.Philox(key=draws.noise_seed[at]))
        noise = torch.from_numpy(generator.standard_normal(crop.shape, np.float32))
        crop = (crop + view.noise_std * noise).clamp(0, 1)
    crop = normalised(crop)
    return F.erase(crop, *draws.erased[at], torch.tensor(0.0)) if draws.erase[at] else crop


def drawn_for(crops: Crops, indices: np.ndarray, height: int, width: int) -> list[tuple[View, Draws, int]]:
    """For each crop of a kind: its view, what is drawn for it, and its size."""
    kinds = [
        (crops.global_1, np.arange(1), crops.global_crops_size),
        (crops.global_2, np.arange(1, crops.global_crops_number), crops.global_crops_size),
        (crops.local, _FIRST_LOCAL + np.arange(crops.local_crops_number), crops.local_crops_size),
    ]
    heights, widths = np.full(len(indices), height), np.full(len(indices), width)
    drawn = []
    for view, numbers, size in kinds:
        of_view = draw(view, indices, numbers, seed=1, epoch=2, heights=heights, widths=widths, size=size)
        drawn.append((view, of_view, size))
    return drawn


@pytest.mark.parametrize(
    "changes",
    [
        {},
        everywhere({"hue": 0.0}),
        everywhere({"contrast": 0.0, "saturation": 0.0}),
        everywhere({"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}),
        everywhere({"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}),
        everywhere(ON),
        # Every view its own.
        {"global_1.jitter_probability": 1.0, "global_2.hue": 0.0, "local.solarize_probability": 1.0},
    ],
)
def test_a_batch_of_crops_is_a_loop_over_torchvision(changes) -> None:
    crops = SMALL.but(changes)
    images = pictures(20, 40, 28)
    indices = np.arange(100, 120)
    global_crops, local_crops = multi_crop(images, indices, seed=1, epoch=2, crops=crops)
    made = (global_crops[:1], global_crops[1:], local_crops)
    for (view, drawn, size), got in zip(drawn_for(crops, indices, 40, 28), made, strict=True):
        for image in range(20):
            for crop in range(len(got)):
                close(got[crop, image], one_crop(images[image], drawn, (image, crop), view, size), 5e-5)


def smooth(number: int, height: int, width: int) -> Tensor:
    """Pictures without edges, as photographs mostly are; noise would be cut off where it is resized."""
    coarse = torch.rand(number, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    large = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("changes", [{}, everywhere(ON)])
def test_both_backends_make_the_same_crops_but_for_rounding_to_8_bits(changes) -> None:
    # No hue, which is not continuous at grey, and no solarising, which is not at its threshold.
    crops = SMALL.but(changes).but(everywhere({"hue": 0.0, "solarize_probability": 0.0}))
    images = smooth(40, 60, 44)
    batched, per_image = (
        multi_crop(images, np.arange(40), seed=1, epoch=2, crops=crops.but({"backend": backend}))
        for backend in ("batched", "per_image")
    )
    for ours, theirs in zip(batched, per_image, strict=True):
        difference = (ours - theirs).abs()
        # A step of 8 bits, of which jitter makes two, in units of the smallest std.
        assert difference.max() < 2.5 / 255 / min(STD)
        assert difference.mean() < 0.5 / 255 / min(STD)


def test_both_backends_have_the_same_distribution_of_colours() -> None:
    images = smooth(400, 60, 44)
    batched, per_image = (
        multi_crop(images, np.arange(400), seed=1, epoch=2, crops=SMALL.but({"backend": backend}))
        for backend in ("batched", "per_image")
    )
    for ours, theirs in zip(batched, per_image, strict=True):
        quantiles = torch.linspace(0.02, 0.98, 25)
        for crop in range(len(ours)):
            for channel in range(3):
                a, b = (crops[crop, :, channel].flatten()[::7].quantile(quantiles) for crops in (ours, theirs))
                close(a, b, 0.02)


def test_images_of_any_size_get_the_crops_that_each_alone_would_get() -> None:
    images = [smooth(1, height, width)[0] for height, width in ((60, 44), (1, 1), (20, 300), (60, 44))]
    indices = np.array([5, 9, 2, 7])
    together = multi_crop(images, indices, seed=3, epoch=1, crops=SMALL)
    for i, image in enumerate(images):
        alone = multi_crop([image], indices[i : i + 1], seed=3, epoch=1, crops=SMALL)
        for crops, crop in zip(together, alone, strict=True):
            assert torch.equal(crops[:, i : i + 1], crop)


def test_the_backend_follows_the_images_unless_it_is_set() -> None:
    small, large, any_size = pictures(2, 48, 40), pictures(2, 40, 49), list(pictures(2))
    assert [SMALL.is_batched(images) for images in (small, large, any_size)] == [True, False, False]
    assert SMALL.but({"backend": "batched"}).is_batched(large)
    assert not SMALL.but({"backend": "per_image"}).is_batched(small)


@pytest.mark.parametrize("backend", ["batched", "per_image"])
def test_what_is_off_is_never_called(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("blend", "shift_hue", "grayscale", "blurred", "solarized", "rotated", "add_noise"):
        monkeypatch.delattr(pixels, name)
    global_crops, local_crops = multi_crop(
        pictures(4), np.arange(4), seed=0, epoch=0, crops=PLAIN.but({"backend": backend})
    )
    assert global_crops.std() > 0.1
    assert local_crops.std() > 0.1


def test_jitter_keeps_each_crops_own_order() -> None:
    view = SMALL.global_1
    (_, drawn, _), *_ = drawn_for(SMALL, np.arange(24), 32, 32)
    order = np.array(list(permutations(range(4))))
    everyone = np.ones((24, 1), dtype=bool)
    drawn = replace(drawn, jitter=everyone, order=order[:, None])
    images = pictures(24)
    got = apply(images, drawn, view, size=32, batched=True)
    for image in range(24):
        close(got[0, image], one_crop(images[image], drawn, (image, 0), view, 32), 2e-5)


def test_whole_is_the_middle_square_resized_and_normalised() -> None:
    images = pictures(3, 30, 44)
    middle = F.center_crop(images.permute(0, 3, 1, 2) / 255, [30, 30])
    expected = normalised(
        F.resize(middle, [20, 20], interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    )
    close(whole(images, 20), expected, 1e-5)
    assert (whole(list(images), 20) - expected).abs().mean() < 1.5 / 255 / min(STD)


def test_crops_of_everything_without_operations_are_the_whole_image() -> None:
    same = PLAIN.but(everywhere({"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}))
    images = pictures(5, 48, 48)
    global_crops, local_crops = multi_crop(images, np.arange(5), seed=0, epoch=0, crops=same)
    assert torch.equal(global_crops, whole(images, 32).expand(2, -1, -1, -1, -1))
    assert torch.equal(local_crops, whole(images, 16).expand(3, -1, -1, -1, -1))


# --------------------------------------------------------------------------------------------- who gets which crop


@pytest.mark.parametrize("backend", ["batched", "per_image"])
def test_an_image_gets_the_same_bits_in_any_batch(backend: str) -> None:
    crops_of = SMALL.but(everywhere(ON) | {"backend": backend})
    images, indices = pictures(100), np.arange(1000, 1100)
    together = multi_crop(images, indices, seed=3, epoch=1, crops=crops_of)
    shuffled = np.random.default_rng(0).permutation(100)
    for crops, moved in zip(
        together, multi_crop(images[shuffled], indices[shuffled], seed=3, epoch=1, crops=crops_of), strict=True
    ):
        assert torch.equal(crops[:, shuffled], moved)
    for image in range(0, 100, 3):
        alone = multi_crop(images[image : image + 1], indices[image : image + 1], seed=3, epoch=1, crops=crops_of)
        for crops, crop in zip(together, alone, strict=True):
            assert torch.equal(crops[:, image : image + 1], crop)


def test_the_numbers_of_crops_change_no_crop() -> None:
    images, indices = pictures(4), np.arange(4)
    few = multi_crop(images, indices, seed=0, epoch=0, crops=SMALL)
    many = multi_crop(
        images, indices, seed=0, epoch=0, crops=SMALL.but({"global_crops_number": 4, "local_crops_number": 5})
    )
    assert torch.equal(few[0], many[0][:2])
    assert torch.equal(few[1], many[1][:3])


def test_seeds_epochs_images_and_crops_all_differ() -> None:
    same_picture = pictures(1).expand(2, -1, -1, -1)

    def crops_of(seed: int, epoch: int) -> list[Tensor]:
        global_crops, local_crops = multi_crop(
            same_picture, np.array([0, 1]), seed=seed, epoch=epoch, crops=SMALL.but({"local_crops_size": 32})
        )
        return [crop for crops in (global_crops, local_crops) for of_images in crops for crop in of_images]

    everything = [crop for seed, epoch in ((0, 0), (0, 1), (1, 0)) for crop in crops_of(seed, epoch)]
    assert len({crop.numpy().tobytes() for crop in everything}) == len(everything) == 3 * 2 * 5


def test_no_local_crops_is_an_empty_tensor_of_their_shape() -> None:
    global_crops, local_crops = multi_crop(
        pictures(4), np.arange(4), seed=0, epoch=0, crops=SMALL.but({"local_crops_number": 0})
    )
    assert global_crops.shape == (2, 4, 3, 32, 32)
    assert local_crops.shape == (0, 4, 3, 16, 16)
    assert global_crops.dtype == local_crops.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- its knobs


def test_defaults_are_the_references() -> None:
    crops = Crops()
    assert (crops.global_crops_size, crops.local_crops_size) == (224, 96)
    assert (crops.global_crops_number, crops.local_crops_number) == (2, 8)
    assert crops.global_1 == View(blur_probability=1.0)
    assert crops.global_2 == View(blur_probability=0.1, solarize_probability=0.2)
    assert crops.local == View(scale=(0.05, 0.4), blur_probability=0.5)


@pytest.mark.parametrize(
    ("knob", "value", "allowed"),
    [
        ("global_1.scale", [0.0, 1.0], "0 < min <= max <= 1"),
        ("global_2.scale", [0.4, 1.1], "0 < min <= max <= 1"),
        ("local.scale", [0.4, 0.05], "0 < min <= max <= 1"),
        ("local.ratio", [2.0, 1.0], "0 < min <= max"),
        ("global_1.ratio", [0.0, 1.0], "0 < min <= max"),
        ("global_2.blur_sigma", [0.0, 1.0], "0 < min <= max"),
        ("local.erasing_scale", [0.5, 1.5], "0 < min <= max <= 1"),
    ],
)
def test_a_wrong_range_is_told_with_its_knob_value_and_what_is_allowed(knob: str, value: list, allowed: str) -> None:
    with pytest.raises(KnobError) as error:
        SMALL.but({knob: value})
    assert f"{knob} = {value}: allowed is {allowed}" in str(error.value)


@pytest.mark.parametrize(
    ("knob", "value"),
    [("global_crops_number", 1), ("local_crops_number", -1), ("global_crops_size", 0), ("local_crops_size", 0)],
)
def test_a_value_out_of_bounds_is_refused(knob: str, value: float) -> None:
    with pytest.raises(KnobError, match=knob):
        SMALL.but({knob: value})


# -------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_crops_on_a_gpu_are_those_of_the_processor() -> None:
    crops = SMALL.but(everywhere(ON) | {"backend": "batched"})
    images, indices = smooth(20, 40, 28), np.arange(20)
    here = multi_crop(images, indices, seed=1, epoch=2, crops=crops)
    there = multi_crop(images.cuda(), indices, seed=1, epoch=2, crops=crops)
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.device.type == "cuda"
        # Solarising is not continuous at its threshold: a pixel may fall on the other side.
        assert ((ours - theirs.cpu()).abs() < 1e-3).float().mean() > 0.999


def test_crops_stay_on_the_device_of_their_images() -> None:
    """Without a GPU: torch refuses to mix devices in its fake tensors as it does in real ones."""
    crops = SMALL.but(everywhere(ON) | {"backend": "batched"})
    with FakeTensorMode():
        images = torch.empty(6, 64, 64, 3, dtype=torch.uint8, device="cuda")
        for made in multi_crop(images, np.arange(6), seed=1, epoch=2, crops=crops):
            assert made.device.type == "cuda"
