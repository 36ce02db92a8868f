"""Masks: how many, where, and how they are drawn."""

import math

import pytest
import torch
from torch import Tensor, nn

from dino_lab.core.methods.patches import block_masks, hidden_number, random_masks

SIDE = 4
N = SIDE * SIDE


@pytest.mark.parametrize(
    ("ratio", "patches", "number"),
    [(0.15, 196, 29), (0.75, 196, 147), (0.4, 196, 78), (0.15, 16, 2), (0.01, 16, 1), (0.99, 16, 15), (0.5, 4, 2)],
)
def test_the_nearest_number_of_patches_is_hidden_but_never_none_or_all(ratio: float, patches: int, number: int) -> None:
    assert hidden_number(ratio, patches) == number


@pytest.mark.parametrize("number", [1, 2, 5, 29, 78, 195])
def test_masks_hide_exactly_this_number_of_patches_in_every_image(number: int) -> None:
    torch.manual_seed(0)
    for hidden in (random_masks(200, 196, number), block_masks(200, 14, number)):
        assert hidden.shape == (200, 196)
        assert (hidden.sum(dim=1) == number).all()


@pytest.mark.parametrize("kind", ["random", "block"])
def test_masks_differ_from_image_to_image_and_follow_torchs_seed(kind: str) -> None:
    def masks(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return random_masks(50, 196, 29) if kind == "random" else block_masks(50, 14, 29)

    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))
    assert len({tuple(row.tolist()) for row in masks(1)}) == 50


def test_random_masks_hide_every_patch_and_every_pair_equally_often() -> None:
    torch.manual_seed(0)
    hidden = random_masks(20000, N, 4).double()
    together = hidden.T @ hidden / len(hidden)
    torch.testing.assert_close(together.diagonal(), torch.full((N,), 4 / N).double(), atol=0.015, rtol=0)
    pairs = together[~torch.eye(N, dtype=torch.bool)]
    torch.testing.assert_close(pairs, torch.full_like(pairs, 4 / N * 3 / (N - 1)), atol=0.012, rtol=0)


@pytest.mark.parametrize(("side", "number"), [(4, 2), (4, 9), (7, 20), (14, 29), (14, 78), (14, 150)])
def test_block_masks_are_those_of_the_algorithm_in_plain_loops(side: int, number: int) -> None:
    images = 20
    torch.manual_seed(3)
    ours = block_masks(images, side, number)

    torch.manual_seed(3)
    masks: list[set[tuple[int, int]]] = [set() for _ in range(images)]
    while any(len(mask) < number for mask in masks):
        sizes, aspects, tops, lefts = (torch.rand(images) for _ in range(4))
        for i, mask in enumerate(masks):
            missing = number - len(mask)
            smallest = min(16, missing)
            area = smallest + sizes[i] * (missing - smallest)
            aspect = torch.exp(math.log(1 / 0.3) - aspects[i] * 2 * math.log(1 / 0.3))
            height = min(max(int((area * aspect).sqrt().round()), 1), side)
            width = min(max(int((area / aspect).sqrt().round()), 1), side)
            top, left = int(tops[i] * (side - height + 1)), int(lefts[i] * (side - width + 1))
            for row in range(top, top + height):
                for column in range(left, left + width):
                    if len(mask) < number:
                        mask.add((row, column))
    for i, mask in enumerate(masks):
        assert {(n // side, n % side) for n in range(side * side) if ours[i, n]} == mask


def test_block_masks_are_blocks() -> None:
    """Nearly every patch that they hide lies in a hidden square of 2 x 2, of random ones nearly none."""

    def in_squares(hidden: Tensor) -> float:
        grid = hidden.view(-1, 1, 14, 14).float()
        squares = nn.functional.avg_pool2d(grid, 2, stride=1) == 1
        covered = nn.functional.max_pool2d(nn.functional.pad(squares.float(), (1, 1, 1, 1)), 2, stride=1)
        return float((covered * grid).sum() / grid.sum())

    torch.manual_seed(0)
    assert in_squares(block_masks(200, 14, 29)) > 0.85
    assert in_squares(random_masks(200, 196, 29)) < 0.05


def test_block_masks_reach_every_patch() -> None:
    torch.manual_seed(0)
    assert block_masks(500, 14, 29).any(dim=0).all()
