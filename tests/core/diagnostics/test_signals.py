import math

import pytest
import torch
import torch.nn.functional as F

from dino_lab.core.diagnostics.signals import marginal_entropy, spread

K = 16


def test_uniform_targets_have_a_marginal_entropy_of_ln_k() -> None:
    assert float(marginal_entropy(torch.full((2, 4, K), 1 / K))) == pytest.approx(math.log(K))


def test_targets_on_one_prototype_have_none() -> None:
    targets = F.one_hot(torch.full((2, 4), 3), K).float()
    assert float(marginal_entropy(targets)) == 0


@pytest.mark.parametrize("used", [2, 4, 8])
def test_one_hot_targets_spread_over_n_prototypes_have_ln_n(used: int) -> None:
    targets = F.one_hot(torch.arange(8).repeat(2, 1) % used, K).float()
    assert float(marginal_entropy(targets)) == pytest.approx(math.log(used))


@pytest.mark.parametrize("used", [1, 2, 8])
def test_the_marginal_entropy_is_of_the_mean_over_crops_as_well_as_images(used: int) -> None:
    """Each crop on prototypes of its own."""
    targets = F.one_hot(torch.stack([torch.arange(8) % used, 8 + torch.arange(8) % used]), K).float()
    assert float(marginal_entropy(targets)) == pytest.approx(math.log(2 * used))


def test_equal_vectors_have_no_deviation_whatever_their_length() -> None:
    lengths = torch.arange(1.0, 9.0).reshape(2, 4, 1)
    assert float(spread(lengths * torch.randn(12))) == pytest.approx(0, abs=1e-6)


def test_vectors_spread_over_the_sphere_have_a_deviation_of_one() -> None:
    features = torch.randn(2, 4000, 64, generator=torch.Generator().manual_seed(0))
    assert float(spread(features)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dimensions", [4, 64])
def test_two_opposite_vectors_for_n_images_have_a_deviation_of_the_root_of_n_over_n_minus_1(dimensions: int) -> None:
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 4, 1)
    assert float(spread(signs * torch.ones(1, 4, dimensions))) == pytest.approx(math.sqrt(4 / 3))


def test_the_deviation_forgets_lengths() -> None:
    vectors = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(1.0, 11.0).reshape(2, 5, 1)
    torch.testing.assert_close(spread(vectors * lengths), spread(vectors))


def test_the_deviation_is_numpys() -> None:
    features = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    rows = features.double().reshape(10, 6).numpy()
    rows = rows / (rows**2).sum(axis=1, keepdims=True) ** 0.5
    assert float(spread(features)) == pytest.approx(rows.std(axis=0, ddof=1).mean() * math.sqrt(6), rel=1e-5)


def test_signals_carry_no_gradient() -> None:
    targets, features = torch.rand(2, 4, K, requires_grad=True), torch.rand(2, 4, 8, requires_grad=True)
    assert not marginal_entropy(targets).requires_grad
    assert not spread(features).requires_grad
