"""Batches in parts, and outcomes of parts put together."""

import pytest
import torch

from dino_lab.core.methods.method import Batch, Outcome, joined


def batch(images: int, *, local_crops: int = 3) -> Batch:
    """Every pixel of image i is 10 times its crop, plus i; its class is i too."""

    def crops(first: int, number: int, size: int) -> torch.Tensor:
        values = 10.0 * torch.arange(first, first + number)[:, None] + torch.arange(images)
        return values[..., None, None, None].expand(-1, -1, 3, size, size)

    return Batch(crops(0, 2, 16), crops(2, local_crops, 8), torch.arange(images))


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_a_batch_is_split_by_images_in_order_with_all_their_crops(parts: int) -> None:
    split = batch(6).split(parts)
    assert len(split) == parts
    size = 6 // parts
    for number, part in enumerate(split):
        images = [float(i) for i in range(number * size, (number + 1) * size)]
        assert part.global_crops[:, :, 0, 0, 0].tolist() == [[10 * crop + i for i in images] for crop in (0, 1)]
        assert part.local_crops[:, :, 2, 7, 7].tolist() == [[10 * crop + i for i in images] for crop in (2, 3, 4)]
        assert part.labels.tolist() == images


def test_a_batch_without_local_crops_is_split_into_batches_without_them() -> None:
    split = batch(4, local_crops=0).split(2)
    assert [part.local_crops.shape for part in split] == [(0, 2, 3, 8, 8)] * 2
    assert [part.labels.tolist() for part in split] == [[0, 1], [2, 3]]


def outcome(first: int, images: int, *, of_targets: bool) -> Outcome:
    """The loss and a measure are the mean over images i of i squared; vectors tell crop and image."""
    i = torch.arange(first, first + images, dtype=torch.float32)
    vectors = torch.stack([10 * crop + i for crop in (0.0, 1.0)])[..., None]
    mean = (i**2).mean()
    return Outcome(
        mean,
        vectors.expand(-1, -1, 5),
        targets=vectors.expand(-1, -1, 7) if of_targets else None,
        outputs=None if of_targets else vectors.expand(-1, -1, 7),
        measures={"tensor": mean, "number": float(mean), "constant": 0.25},
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("of_targets", [True, False])
def test_the_outcomes_of_parts_make_that_of_the_whole(parts: int, of_targets: bool) -> None:
    size = 8 // parts
    ours = joined([outcome(part * size, size, of_targets=of_targets) for part in range(parts)])
    whole = outcome(0, 8, of_targets=of_targets)
    assert torch.equal(ours.loss, whole.loss)
    assert torch.equal(ours.features, whole.features)
    if of_targets:
        assert torch.equal(ours.targets, whole.targets)
        assert ours.outputs is None
    else:
        assert torch.equal(ours.outputs, whole.outputs)
        assert ours.targets is None
    assert ours.measures == whole.measures


def test_outcomes_without_vectors_or_measures_are_put_together_without_them() -> None:
    ours = joined([Outcome(torch.tensor(value), torch.full((2, 1, 5), value)) for value in (1.0, 4.0)])
    assert ours.loss == 2.5
    assert ours.features[0, :, 0].tolist() == [1, 4]
    assert ours.targets is None
    assert ours.outputs is None
    assert ours.measures == {}
