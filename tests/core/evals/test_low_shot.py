import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dino_lab.core.evals.low_shot import LowShot, chosen


def clusters(number: int, classes: int, *, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    centers = torch.randn(classes, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(number) % classes
    return centers[labels] + noise * torch.randn(number, 12, generator=torch.Generator().manual_seed(seed)), labels


def test_separable_features_are_classified_perfectly_by_one_image_of_each_class() -> None:
    train, test = clusters(500, 5, noise=0.01, seed=0), clusters(100, 5, noise=0.01, seed=1)
    assert LowShot().top1(*train, *test) == {0.01: 100, 0.1: 100}


def test_noise_is_classified_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(2000, 8, generator=generator) for _ in range(2))
    labels, truth = (torch.randint(0, 4, (2000,), generator=generator) for _ in range(2))
    for percent in LowShot().top1(train, labels, test, truth).values():
        assert percent == pytest.approx(25, abs=4)


def test_it_is_scikit_learns_regression_of_the_chosen_images() -> None:
    (train, labels), (test, truth) = clusters(600, 6, noise=1.5, seed=0), clusters(300, 6, noise=1.5, seed=1)
    places = chosen(labels, 0.1)
    theirs = LogisticRegression(C=10, max_iter=1000)
    theirs.fit(F.normalize(train[places], dim=-1).numpy(), labels[places].numpy())
    expected = 100 * theirs.score(F.normalize(test, dim=-1).numpy(), truth.numpy())
    assert LowShot(penalty=0.1).top1(train, labels, test, truth)[0.1] == pytest.approx(expected)
    assert LowShot(penalty=1e6).top1(train, labels, test, truth)[0.1] != pytest.approx(expected)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_each_class_gives_the_same_part_at_least_one_and_its_first(fraction: float) -> None:
    labels = torch.tensor([0] * 300 + [1] * 40 + [3] * 2)[torch.randperm(342)]
    places = chosen(labels, fraction)
    for label, number in ((0, 300), (1, 40), (3, 2)):
        expected = max(1, round(fraction * number))
        assert places[labels[places] == label].tolist() == (labels == label).nonzero()[:expected, 0].tolist()


def test_a_smaller_part_is_part_of_a_larger_one() -> None:
    labels = torch.randint(0, 7, (500,), generator=torch.Generator().manual_seed(0))
    assert set(chosen(labels, 0.05).tolist()) < set(chosen(labels, 0.2).tolist())


def test_of_a_single_class_all_are_called_by_it() -> None:
    train, truth = torch.randn(10, 3), torch.tensor([4, 4, 0])
    assert LowShot().top1(train, torch.full((10,), 4), torch.randn(3, 3), truth)[0.1] == pytest.approx(200 / 3)
