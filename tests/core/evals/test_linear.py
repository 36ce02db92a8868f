"""The linear probe: plain loops, scikit-learn, and that nothing is chosen on test labels."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from dino_lab.core.evals.linear import LinearProbe, _held_out, _logits


def clusters(number: int, classes: int, *, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    centers = torch.randn(classes, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(number) % classes
    return centers[labels] + noise * torch.randn(number, 12, generator=torch.Generator().manual_seed(seed)), labels


def plain(features: Tensor, labels: Tensor, rate: float, *, classes: int, probe: LinearProbe, seed: int) -> nn.Linear:
    """One learning rate with torch's own layer, optimiser and schedule, over the same start and batches."""
    order = torch.Generator().manual_seed(seed)
    layer = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(features.shape[1], classes, generator=order).T)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * probe.batch_size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, probe.epochs)
    for _ in range(probe.epochs):
        shuffled = torch.randperm(len(features), generator=order)
        for step in range(len(features) // probe.batch_size):
            batch = shuffled[step * probe.batch_size :][: probe.batch_size]
            optimizer.zero_grad()
            F.cross_entropy(layer(features[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return layer


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["usual", "probabilities that underflow"])
def test_each_rate_is_trained_as_it_would_be_alone_by_torch(scale: float) -> None:
    features, labels = clusters(50, 4, noise=1.0, seed=0)
    features = scale * features
    probe = LinearProbe(epochs=3, batch_size=16)
    rates = (0.01, 0.3, 2.0)
    together = probe._trained(features, labels, rates, classes=4, seed=5)
    for rate, weights in zip(rates, together, strict=True):
        alone = plain(features, labels, rate, classes=4, probe=probe, seed=5)
        torch.testing.assert_close(weights[:-1], alone.weight.T.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights[-1], alone.bias.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_accuracy_is_that_of_scikit_learns_regression(noise: float) -> None:
    """Both end at the least loss; with 1,000 test images one standard error is 1.5 points."""
    train, test = clusters(2000, 5, noise=noise, seed=0), clusters(1000, 5, noise=noise, seed=1)
    ours, _ = LinearProbe(epochs=50, batch_size=128).top1(*train, *test, seed=0)
    theirs = LogisticRegression(C=1e4, max_iter=2000).fit(train[0].numpy(), train[1].numpy())
    assert ours == pytest.approx(100 * theirs.score(test[0].numpy(), test[1].numpy()), abs=1.0)
    assert 40 < ours < 99


def test_separable_features_are_classified_perfectly_and_noise_by_chance() -> None:
    ours, _ = LinearProbe().top1(*clusters(200, 5, noise=0.05, seed=0), *clusters(100, 5, noise=0.05, seed=1), seed=0)
    assert ours == 100
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(2000, 8, generator=generator) for _ in range(2))
    labels, truth = (torch.randint(0, 4, (2000,), generator=generator) for _ in range(2))
    assert LinearProbe(epochs=5).top1(train, labels, test, truth, seed=0)[0] == pytest.approx(25, abs=4)


def test_test_labels_choose_nothing() -> None:
    train, (features, truth) = clusters(300, 5, noise=2.0, seed=0), clusters(200, 5, noise=2.0, seed=1)
    probe = LinearProbe(epochs=5, batch_size=64)
    percent, rate = probe.top1(*train, features, truth, seed=0)
    wrong, same_rate = probe.top1(*train, features, (truth + 1) % 5, seed=0)
    assert same_rate == rate
    assert wrong < percent


def test_the_rate_is_the_one_that_is_best_on_what_is_held_out_and_all_are_trained_on_with_it() -> None:
    features, labels = clusters(300, 5, noise=2.0, seed=0)
    test = clusters(200, 5, noise=2.0, seed=1)
    probe = LinearProbe(epochs=5, batch_size=64, learning_rates=(1e-6, 0.1, 1e-5))
    held_out = _held_out(labels, 0.1, 3)
    alone = [probe._trained(features[~held_out], labels[~held_out], (rate,), classes=5, seed=3) for rate in (1e-6, 0.1)]
    right = [(_logits(each, features[held_out])[0].argmax(-1) == labels[held_out]).sum() for each in alone]
    assert right[1] > right[0]
    percent, rate = probe.top1(features, labels, *test, seed=3)
    assert rate == 0.1
    final = probe._trained(features, labels, (0.1,), classes=5, seed=3)
    expected = (_logits(final, test[0])[0].argmax(-1) == test[1]).float().mean()
    assert percent == pytest.approx(100 * float(expected))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_part_of_each_class_is_held_out_and_one_image_stays(fraction: float) -> None:
    labels = torch.tensor([0] * 40 + [1] * 7 + [2] + [3] * 2)[torch.randperm(50)]
    held_out = _held_out(labels, fraction, seed=1)
    for label, number in ((0, 40), (1, 7), (2, 1), (3, 2)):
        expected = min(round(fraction * number), number - 1)
        assert int(held_out[labels == label].sum()) == pytest.approx(
            expected, abs=math.isclose(fraction * number % 1, 0.5)
        )
    assert torch.equal(_held_out(labels, fraction, seed=1), held_out)
    assert not torch.equal(_held_out(labels, fraction, seed=2), held_out)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    LinearProbe(epochs=2).top1(*clusters(50, 3, noise=1.0, seed=0), *clusters(20, 3, noise=1.0, seed=1), seed=0)
    assert torch.equal(torch.rand(3), expected)
