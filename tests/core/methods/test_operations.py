"""What is done to the teacher's logits, against the paper's pseudo-code and closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_lab.core.methods.operations import Centering, NoOperation, Sinkhorn, SoftmaxBatch, sharpened, sinkhorn

G, B, K = 2, 6, 8
OPERATIONS = [Centering(), NoOperation(), SoftmaxBatch(), Sinkhorn()]
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.kind)
each_of_the_batch = pytest.mark.parametrize("operation", OPERATIONS[2:], ids=lambda operation: operation.kind)


def logits(scale: float = 1.0, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(G, B, K, generator=generator, dtype=dtype)


def zero(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(K, dtype=dtype)


def plain_sinkhorn(x: np.ndarray, tau: float, iterations: int) -> np.ndarray:
    """x is n by K. The article's pseudo-code, with a loop for every sum.

    Source: DINO (arXiv:2104.14294), Appendix, "Sinkhorn-Knopp".
    """
    x = np.exp(x / tau)
    n, k = x.shape
    for _ in range(iterations):
        for column in range(k):  # the weight of a prototype
            x[:, column] /= sum(x[row, column] for row in range(n))
        for row in range(n):  # the weight of an image
            x[row] /= sum(x[row, column] for column in range(k))
    return x


def plain_softmax_batch(x: np.ndarray, tau: float) -> np.ndarray:
    """x is n by K. For each prototype a softmax over the images; then each image's shares are made to sum to 1."""
    n, k = x.shape
    shares = np.array(
        [[math.exp(x[i, j] / tau) / sum(math.exp(x[r, j] / tau) for r in range(n)) for j in range(k)] for i in range(n)]
    )
    return np.array([row / sum(row) for row in shares])


# ------------------------------------------------------------------------------------------------------- sinkhorn


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize(("teacher_temp", "scale"), [(0.04, 1.0), (0.5, 1.0), (0.01, 0.3)])
def test_sinkhorn_is_the_articles_over_images_of_all_global_crops(
    teacher_temp: float, scale: float, iterations: int
) -> None:
    x = logits(scale)
    ours = Sinkhorn(iterations=iterations).targets(x, zero(), teacher_temp)
    plain = plain_sinkhorn(x.reshape(G * B, K).numpy(), teacher_temp, iterations)
    torch.testing.assert_close(ours, torch.from_numpy(plain).view(G, B, K), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_many_iterations_give_every_prototype_an_equal_share_of_the_images(scale: float) -> None:
    targets = sinkhorn(logits(scale), 0.5, iterations=2000).view(G * B, K)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(G * B).double())
    torch.testing.assert_close(targets.sum(dim=0), torch.full((K,), G * B / K).double(), rtol=1e-6, atol=0)


def test_more_iterations_bring_the_shares_of_prototypes_nearer() -> None:
    def unevenness(iterations: int) -> float:
        shares = sinkhorn(logits(), 0.1, iterations=iterations).sum(dim=(0, 1))
        return float((shares - G * B / K).norm())

    distances = [unevenness(iterations) for iterations in (1, 2, 4, 8, 16, 32)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0] / 4


def test_softmax_over_the_batch_is_sinkhorn_of_one_iteration() -> None:
    for teacher_temp in (0.04, 0.1, 1.0):
        for seed in range(3):
            ours = SoftmaxBatch().targets(logits(0.1, seed=seed), zero(), teacher_temp)
            theirs = Sinkhorn(iterations=1).targets(logits(0.1, seed=seed), zero(), teacher_temp)
            torch.testing.assert_close(ours, theirs)
            plain = plain_softmax_batch(logits(0.1, seed=seed).view(G * B, K).numpy(), teacher_temp)
            torch.testing.assert_close(ours, torch.from_numpy(plain).view(G, B, K), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("teacher_temp", [0.01, 0.04, 0.07])
def test_softmax_over_the_batch_is_sinkhorn_of_one_iteration_where_an_image_is_far_from_all_prototypes(
    teacher_temp: float,
) -> None:
    x = logits(0.1, dtype=torch.float32)
    x[0, 0] -= 2  # as far as a cosine can be from the others'
    ours = SoftmaxBatch().targets(x, zero(torch.float32), teacher_temp)
    torch.testing.assert_close(ours, Sinkhorn(iterations=1).targets(x, zero(torch.float32), teacher_temp))
    plain = plain_softmax_batch(x.double().view(G * B, K).numpy(), teacher_temp)
    torch.testing.assert_close(ours.double(), torch.from_numpy(plain).view(G, B, K), rtol=1e-4, atol=1e-6)


@each_of_the_batch
def test_a_logit_that_all_images_share_changes_nothing(operation: SoftmaxBatch | Sinkhorn) -> None:
    """Why no single prototype can win: what centring subtracts is divided out here."""
    shared = torch.linspace(-0.3, 0.3, K).double()
    ours = operation.targets(logits(0.2) + shared, zero(), 0.1)
    torch.testing.assert_close(ours, operation.targets(logits(0.2), zero(), 0.1))


@each_of_the_batch
def test_images_may_come_in_any_order(operation: SoftmaxBatch | Sinkhorn) -> None:
    order = torch.randperm(G * B, generator=torch.Generator().manual_seed(0))
    x = logits(0.2).view(1, G * B, K)
    ours = operation.targets(x[:, order], zero(), 0.1)
    torch.testing.assert_close(ours, operation.targets(x, zero(), 0.1)[:, order])


# --------------------------------------------------------------------------------------------------- sharpening


@each_operation
@pytest.mark.parametrize("scale", [0.1, 1.0, 1000.0])
@pytest.mark.parametrize("teacher_temp", [0.01, 0.04, 1.0])
def test_targets_are_distributions_and_nothing_overflows(
    operation: Centering | NoOperation | SoftmaxBatch | Sinkhorn, teacher_temp: float, scale: float
) -> None:
    targets = operation.targets(logits(scale, dtype=torch.float32), zero(torch.float32), teacher_temp)
    assert torch.isfinite(targets).all()
    assert targets.min() >= 0
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(G, B))


def test_sharpened_is_a_softmax_of_this_temperature() -> None:
    x = logits()
    plain = [[[math.exp(x[g, i, k] / 0.3) for k in range(K)] for i in range(B)] for g in range(G)]
    plain = [[[value / sum(row) for value in row] for row in crop] for crop in plain]
    torch.testing.assert_close(sharpened(x, 0.3), torch.tensor(plain, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperature_zero_is_arg_max(dtype: torch.dtype) -> None:
    x = logits(dtype=dtype)
    targets = sharpened(x, 0.0)
    assert targets.dtype == dtype
    for row, target in zip(x.view(-1, K), targets.view(-1, K), strict=True):
        assert target.tolist() == [float(value == row.max()) for value in row]


def test_temperature_zero_is_the_limit_of_small_temperatures() -> None:
    distances = [(sharpened(logits(), temp) - sharpened(logits(), 0.0)).abs().max() for temp in (1.0, 0.1, 1e-2, 1e-4)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-12


def test_an_infinite_temperature_is_uniform() -> None:
    torch.testing.assert_close(sharpened(logits(), 1e12), torch.full((G, B, K), 1 / K).double())


# ------------------------------------------------------------------------------------------------------ centring


@pytest.mark.parametrize("teacher_temp", [0.0, 0.04, 1.0])
def test_centring_subtracts_the_centre_before_the_temperature(teacher_temp: float) -> None:
    x, center = logits(), torch.linspace(-2, 2, K).double()
    shifted = torch.stack([torch.stack([image - center for image in crop]) for crop in x])
    torch.testing.assert_close(Centering().shifted(x, center), shifted)
    torch.testing.assert_close(Centering().targets(x, center, teacher_temp), sharpened(shifted, teacher_temp))


@pytest.mark.parametrize("operation", OPERATIONS[1:], ids=lambda operation: operation.kind)
def test_without_centring_the_centre_is_neither_used_nor_moved(
    operation: NoOperation | SoftmaxBatch | Sinkhorn,
) -> None:
    x, center = logits(0.1), torch.linspace(-2, 2, K).double()
    before = center.clone()
    assert torch.equal(operation.shifted(x, center), x)
    assert torch.equal(operation.targets(x, center, 0.1), operation.targets(x, zero(), 0.1))
    operation.move_center(center, center + 1)
    assert torch.equal(center, before)


def test_no_operation_only_sharpens() -> None:
    assert torch.equal(NoOperation().targets(logits(), zero(), 0.1), sharpened(logits(), 0.1))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 1.0])
def test_a_centre_that_started_at_zero_is_a_share_of_a_mean_that_stays(momentum: float) -> None:
    center, mean = zero(), torch.linspace(-2, 2, K).double()
    for step in range(1, 6):
        Centering(center_momentum=momentum).move_center(center, mean)
        torch.testing.assert_close(center, (1 - momentum**step) * mean)
    if momentum == 0:
        assert torch.equal(center, mean)
    if momentum == 1:
        assert torch.equal(center, zero())
