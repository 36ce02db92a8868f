import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.diagnostics import signals
from dino_lab.core.diagnostics.signals import at_places, distance, effective_rank, gradient_norms, spectrum, spread


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


# --------------------------------------------------------------------------------------------- rank and spectrum


def rotated(singular_values: list[float], *, rows: int, columns: int) -> Tensor:
    """A matrix with these singular values and random directions, as of two crops."""
    number = len(singular_values)
    left, right = (torch.linalg.qr(random(side, number, seed=side))[0] for side in (rows, columns))
    return (left * torch.tensor(singular_values) @ right.T).unflatten(0, (2, -1))


@pytest.mark.parametrize(("rows", "columns"), [(8, 20), (20, 8)])
def test_the_spectrum_is_the_singular_values_of_all_crops_together(rows: int, columns: int) -> None:
    values = spectrum(rotated([5.0, 2.0, 1.0], rows=rows, columns=columns))
    torch.testing.assert_close(values, torch.tensor([5.0, 2.0, 1.0] + [0.0] * 5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("equal", [1, 2, 7])
def test_n_equal_singular_values_have_an_effective_rank_of_n(equal: int) -> None:
    values = spectrum(rotated([3.0] * equal, rows=16, columns=10))
    assert effective_rank(values) == pytest.approx(equal, rel=1e-4)


def test_the_effective_rank_is_that_of_the_source_in_numpy() -> None:
    vectors = random(2, 6, 9)
    values = np.linalg.svd(vectors.flatten(0, 1).double().numpy(), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(spectrum(vectors)) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_the_effective_rank_knows_no_scale_and_no_rotation() -> None:
    vectors, turn = random(2, 6, 9), torch.linalg.qr(random(9, 9, seed=1))[0]
    assert effective_rank(spectrum(7 * vectors @ turn)) == pytest.approx(effective_rank(spectrum(vectors)), rel=1e-5)


def test_the_spectrum_is_told_at_powers_of_two_beside_the_largest() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.01])
    assert at_places(values) == {2: 0.5, 4: 0.125, 8: 0.0625 / 8}
    assert at_places(values[:1]) == {}


def test_vectors_that_are_not_finite_have_no_rank_and_raise_nothing() -> None:
    vectors = random(2, 3, 4)
    vectors[0, 1, 2] = math.inf
    assert math.isnan(effective_rank(spectrum(vectors)))


def test_features_and_outputs_are_told_under_their_own_names() -> None:
    vectors = random(2, 4, 6)
    features, outputs = signals.of_features(vectors), signals.of_outputs(vectors)
    assert features[records.EMBEDDING_RANK] == outputs[records.OUTPUT_RANK] == effective_rank(spectrum(vectors))
    assert features[records.EMBEDDING_STD] == outputs[records.OUTPUT_STD] == spread(vectors)
    second = float(spectrum(vectors)[1] / spectrum(vectors)[0])
    assert features[f"{records.EMBEDDING_SPECTRUM}2"] == outputs[f"{records.OUTPUT_SPECTRUM}2"] == second
    assert signals.of_outputs(None) == {}


# ------------------------------------------------------------------------------------------ weights and gradients


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head, self.held = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)


def test_the_gradients_norm_is_told_of_each_part_that_has_one() -> None:
    parts = Parts()
    parts.head(parts.backbone(random(5, 3))).pow(2).sum().backward()
    norms = gradient_norms(parts)
    assert norms.keys() == {"backbone", "head"}
    for name in norms:
        gradients = [p.grad.flatten() for p in parts.get_submodule(name).parameters() if p.grad is not None]
        torch.testing.assert_close(norms[name], torch.cat(gradients).norm())


def test_networks_with_the_same_weights_are_no_distance_apart_and_a_scaled_one_is_what_it_was_scaled_by() -> None:
    student = Parts()
    teacher = copy.deepcopy(student)
    assert float(distance(teacher, student)) == 0
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.25)
    assert float(distance(teacher, student)) == pytest.approx(0.25, rel=1e-5)


def test_weights_whose_squares_are_no_float32_have_a_distance() -> None:
    student = Parts()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1e30)
    assert float(distance(teacher, student)) == pytest.approx(1)


def test_signals_carry_no_gradient() -> None:
    features = torch.rand(2, 4, 8, requires_grad=True)
    assert not spread(features).requires_grad
    assert not spectrum(features).requires_grad
