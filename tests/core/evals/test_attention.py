"""Jaccard indices of attention: against plain loops over pixels, and against cases that are counted by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_lab.core.data.crops import whole
from dino_lab.core.evals.attention import Attention, jaccard, patches_of_mass, whole_masks
from dino_lab.core.settings import KnobError


def marked(*heads: str) -> Tensor:
    """The patches that each head of one image marks with a cross."""
    return torch.tensor([[[mark == "x" for mark in head.replace(" ", "")] for head in heads]])


def mask(*rows: list[int]) -> Tensor:
    """Of one image."""
    return torch.tensor([rows], dtype=torch.uint8)


def random_attention(images: int = 5, heads: int = 6, side: int = 7) -> Tensor:
    """Without the CLS token's own part, so that a head's does not sum to 1."""
    scores = torch.randn(images, heads, side**2 + 1, generator=torch.Generator().manual_seed(0))
    return (2 * scores).softmax(dim=-1)[..., 1:]


# -------------------------------------------------------------------------------------------------- mass of a head


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.8, 0.95])
def test_patches_are_the_largest_and_no_fewer_would_hold_the_mass(mass: float) -> None:
    attention = random_attention()
    kept = patches_of_mass(attention, mass)
    for weights, chosen in zip(attention.flatten(0, 1).double(), kept.flatten(0, 1), strict=True):
        needed = mass * weights.sum()
        assert weights[chosen].min() > weights[~chosen].max()
        assert weights[chosen].sum() >= needed
        assert weights[chosen].sum() - weights[chosen].min() < needed


@pytest.mark.parametrize(
    ("mass", "kept"), [(0.5, "x..."), (0.51, "x..x"), (0.75, "x..x"), (0.76, "xx.x"), (0.91, "xxxx"), (1.0, "xxxx")]
)
def test_patches_that_hold_exactly_the_mass_are_enough(mass: float, kept: str) -> None:
    attention = torch.tensor([[[4.0, 1.25, 0.75, 2.0]]])
    assert torch.equal(patches_of_mass(attention, mass), marked(kept))


@pytest.mark.parametrize(("mass", "kept"), [(0.1, 5), (0.5, 25), (0.6, 30), (0.8, 40), (0.99, 49)])
def test_of_uniform_attention_that_share_of_patches_is_kept(mass: float, kept: int) -> None:
    assert kept == math.ceil(mass * 49)
    assert patches_of_mass(torch.full((2, 3, 49), 0.01), mass).sum(dim=-1).tolist() == [[kept] * 3] * 2


def test_the_whole_mass_is_all_patches() -> None:
    assert patches_of_mass(random_attention(), 1.0).all()


# -------------------------------------------------------------------------------------------------- Jaccard index


def test_a_head_on_the_object_is_perfect_and_one_beside_it_is_worth_nothing() -> None:
    square = mask([1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4)
    assert jaccard(marked("x. .."), square).tolist() == [1]
    assert jaccard(marked(".x xx"), square).tolist() == [0]


def test_a_case_by_hand_has_this_index() -> None:
    """Two patches of four pixels are marked; five pixels are the object's, and three of them marked."""
    image = mask([1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0])
    assert jaccard(marked("xx .."), image).item() == pytest.approx(3 / (8 + 5 - 3))


def test_patches_lie_row_by_row() -> None:
    image = mask([0, 7], [0, 0])
    assert [jaccard(marked(patches), image).item() for patches in (".x ..", ".. x.")] == [1, 0]


def test_each_object_has_its_own_best_head_and_all_objects_count_alike() -> None:
    """By the three heads, the first object's are 1, 0 and 4/16, the second one's 0, 1/4 and 1/16."""
    two = mask([4, 4, 0, 0], [4, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 9])
    assert jaccard(marked("x. ..", ".. .x", "xx xx"), two).item() == pytest.approx((1 + 1 / 4) / 2)
    assert jaccard(marked("xx xx"), two).item() == pytest.approx((4 / 16 + 1 / 16) / 2)


def test_void_pixels_count_for_nothing() -> None:
    """Of the four marked pixels one is void and two are the object's, of whose three one is elsewhere."""
    bordered = mask([3, 3, 0, 0], [255, 0, 255, 0], [0, 0, 0, 0], [0, 0, 0, 3])
    assert jaccard(marked("x. .."), bordered).item() == pytest.approx(2 / (3 + 3 - 2))
    without = bordered.where(bordered != 255, 0)
    assert jaccard(marked("x. .."), without).item() == pytest.approx(2 / (4 + 3 - 2))


def test_an_image_without_an_object_has_none_and_is_left_out_of_the_mean() -> None:
    nothing, object_ = mask([0, 255], [0, 0]), mask([0, 1], [0, 0])
    marks = marked(".x .x").expand(2, -1, -1)
    assert jaccard(marks, torch.cat([nothing, object_])).isnan().tolist() == [True, False]
    assert Attention(mass=(1.0,)).jaccard(marks.float(), torch.cat([nothing, object_])) == {1.0: 50}
    assert math.isnan(Attention(mass=(1.0,)).jaccard(marks.float()[:1], nothing)[1.0])


def test_the_mean_is_over_images_and_not_over_objects() -> None:
    images = torch.cat([mask([1, 2], [0, 0]), mask([1, 0], [0, 0])])
    attention = torch.tensor([[[0.0, 0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]]])
    assert Attention().jaccard(attention, images) == {0.6: 50, 0.8: 50}


def by_pixels(attention: Tensor, masks: Tensor, mass: float) -> float:
    """The protocol in plain loops: enlarged masks of heads, and sets of pixels."""
    side, size = math.isqrt(attention.shape[-1]), masks.shape[-1]
    of_images = []
    for image, truth in zip(attention.double().numpy(), masks.numpy(), strict=True):
        seen = {(y, x) for y in range(size) for x in range(size) if truth[y, x] != 255}
        of_heads = []
        for head in image:
            held, patches = 0.0, set()
            for place in np.argsort(-head):
                if held < mass * head.sum():
                    patches.add(divmod(int(place), side))
                    held += head[place]
            of_heads.append({(y, x) for y, x in seen if (y * side // size, x * side // size) in patches})
        best = []
        for each in set(truth.flatten().tolist()) - {0, 255}:
            object_ = {(y, x) for y, x in seen if truth[y, x] == each}
            best.append(max(len(head & object_) / len(head | object_) for head in of_heads))
        of_images.append(sum(best) / len(best))
    return 100 * sum(of_images) / len(of_images)


def test_percent_of_each_mass_are_those_of_the_protocol_in_plain_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.tensor([0, 0, 0, 1, 2, 5, 255], dtype=torch.uint8)[torch.randint(7, (5, 5, 5), generator=generator)]
    masks = blocks.repeat_interleave(6, dim=1).repeat_interleave(6, dim=2)[:, 1:29, 2:30]
    settings = Attention(mass=(0.3, 0.6, 0.8))
    found = settings.jaccard(random_attention(), masks)
    assert found == pytest.approx({mass: by_pixels(random_attention(), masks, mass) for mass in settings.mass})
    assert all(5 < percent < 60 for percent in found.values())


@pytest.mark.parametrize("mass", [[], [0.0], [0.6, 1.1]])
def test_a_mass_that_is_no_share_is_refused_by_name(mass: list[float]) -> None:
    with pytest.raises(KnobError, match=r"^mass"):
        Attention().but({"mass": mass})


# ----------------------------------------------------------------------------------------------------- whole masks


def white_where(masks: Tensor) -> Tensor:
    """Images that show their masks."""
    return (255 * (masks > 0).to(torch.uint8))[..., None].expand(-1, -1, -1, 3).contiguous()


@pytest.mark.parametrize(("height", "width"), [(48, 48), (60, 91), (90, 61), (31, 30)])
@pytest.mark.parametrize("size", [24, 48, 120])
def test_masks_and_images_show_the_same_place(height: int, width: int, size: int) -> None:
    """The middles of discs, in the mask and in the image, are as near as the nearest pixel is to where it belongs."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    discs = [(0.45, 0.55, 9), (0.5, 0.4, 12)]
    masks = torch.stack([(y - a * height) ** 2 + (x - b * width) ** 2 < r**2 for a, b, r in discs]).to(torch.uint8)
    shown = whole(white_where(masks), size).mean(dim=1) > 0.2  # grey of the middle, normalised
    drawn = whole_masks(masks, size) > 0
    assert drawn.shape == (2, size, size)
    for ours, theirs in zip(drawn, shown, strict=True):
        error = ours.nonzero().double().mean(dim=0) - theirs.nonzero().double().mean(dim=0)
        assert error.abs().max() < 0.5 * min(1, size / min(height, width)) + 0.1
        assert (ours & theirs).sum() > 0.8 * (ours | theirs).sum()


def test_masks_keep_their_values() -> None:
    masks = torch.tensor([0, 3, 255], dtype=torch.uint8)[torch.arange(3 * 5 * 9).view(3, 5, 9) % 3]
    assert torch.equal(whole_masks(masks, 5), masks[:, :, 2:7])
    assert set(whole_masks(masks, 12).unique().tolist()) == {0, 3, 255}


def test_attention_that_is_the_image_finds_the_object_that_is_drawn() -> None:
    """Whole photographs of 64 x 96 pixels, evaluated at 32 with patches of 8: the object covers three patches."""
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[0, 16:32, 32:64] = masks[0, 32:48, 32:48] = 1
    light = whole(white_where(masks), 32).mean(dim=1) - whole(white_where(0 * masks), 32).mean(dim=1)
    attention = light.unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(3, 4)).flatten(1).clamp(min=0)[:, None]
    found = Attention(mass=(0.9,)).jaccard(attention, whole_masks(masks, 32))
    assert found == {0.9: 100}
