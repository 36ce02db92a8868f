"""The losses between teacher and student, against numpy loops over pairs of crops and closed forms."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lab.core.methods.losses import (
    MSE,
    Cosine,
    CrossEntropy,
    InfoNCE,
    agreement,
    cross_entropy,
    entropy,
    kl_divergence,
    mean_product,
    pairs_number,
)

from .small import B, pairs

K = 32
each_number_of_crops = pytest.mark.parametrize(("globals_number", "crops_number"), [(2, 2), (2, 5), (1, 3), (3, 4)])

each_comparison = pytest.mark.parametrize("loss", [MSE(), Cosine(), InfoNCE()], ids=lambda loss: loss.kind)


def random(crops: int, seed: int = 0) -> Tensor:
    return torch.randn(crops, B, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(crops: int, seed: int = 0) -> Tensor:
    return random(crops, seed).log_softmax(dim=-1)


def units(crops: int, seed: int = 0) -> Tensor:
    return F.normalize(random(crops, seed), dim=-1)


def over_pairs(one: Callable[[int, int, int], float], globals_number: int, crops_number: int) -> float:
    """Mean of one(g, v, i) over images i, global crops g of the teacher, and other crops v of the student."""
    return float(np.mean([one(g, v, i) for g, v, i in pairs(globals_number, crops_number)]))


# ------------------------------------------------------------------------------------- numpy, a loop over pairs


@each_number_of_crops
def test_cross_entropy_and_kl_are_those_of_every_pair(globals_number: int, crops_number: int) -> None:
    targets, probs = log_probs(globals_number, seed=1).exp(), log_probs(crops_number)
    q, log_p = targets.numpy(), probs.numpy()
    ours = cross_entropy(targets, probs).item()
    plain = over_pairs(lambda g, v, i: -np.sum(q[g, i] * log_p[v, i]), globals_number, crops_number)
    assert ours == pytest.approx(plain, abs=1e-12)
    ours = kl_divergence(targets, probs).item()
    plain = over_pairs(lambda g, v, i: np.sum(q[g, i] * (np.log(q[g, i]) - log_p[v, i])), globals_number, crops_number)
    assert ours == pytest.approx(plain, abs=1e-12)


@each_number_of_crops
def test_mse_is_the_squared_distance_of_every_pair(globals_number: int, crops_number: int) -> None:
    targets, outputs = units(globals_number, seed=1), units(crops_number)
    q, p = targets.numpy(), outputs.numpy()
    plain = over_pairs(lambda g, v, i: np.sum((q[g, i] - p[v, i]) ** 2), globals_number, crops_number)
    assert MSE().between(targets, outputs).item() == pytest.approx(plain, abs=1e-12)


@each_number_of_crops
def test_cosine_is_the_negative_cosine_of_every_pair(globals_number: int, crops_number: int) -> None:
    targets, outputs = units(globals_number, seed=1), units(crops_number)
    q, p = targets.numpy(), outputs.numpy()

    def cosine(g: int, v: int, i: int) -> float:
        return float(q[g, i] @ p[v, i] / np.sqrt((q[g, i] @ q[g, i]) * (p[v, i] @ p[v, i])))

    plain = -over_pairs(cosine, globals_number, crops_number)
    assert Cosine().between(targets, outputs).item() == pytest.approx(plain, abs=1e-12)


@each_number_of_crops
def test_agreement_is_the_fraction_of_pairs_with_the_same_largest(globals_number: int, crops_number: int) -> None:
    # Of few prototypes, so that some agree.
    targets, probs = log_probs(globals_number, seed=1)[..., :3], log_probs(crops_number)[..., :3]
    theirs, ours = targets.numpy().argmax(axis=-1), probs.numpy().argmax(axis=-1)
    expected = over_pairs(lambda g, v, i: float(theirs[g, i] == ours[v, i]), globals_number, crops_number)
    assert agreement(targets.exp(), probs).item() == pytest.approx(expected)
    assert 0 < expected < 1


@each_number_of_crops
@pytest.mark.parametrize("temp", [0.07, 0.2, 1.0])
def test_info_nce_tells_each_image_from_the_others_of_the_teacher(
    temp: float, globals_number: int, crops_number: int
) -> None:
    targets, outputs = units(globals_number, seed=1), units(crops_number)
    q, p = targets.numpy(), outputs.numpy()

    def negative_log_share(g: int, v: int, i: int) -> float:
        likeness = [math.exp(sum(q[g, j] * p[v, i]) / temp) for j in range(B)]
        return -math.log(likeness[i] / sum(likeness))

    plain = over_pairs(negative_log_share, globals_number, crops_number)
    assert InfoNCE(temp=temp).between(targets, outputs).item() == pytest.approx(plain, abs=1e-12)


@each_number_of_crops
def test_the_number_of_pairs_is_that_of_a_loop(globals_number: int, crops_number: int) -> None:
    number = sum(g != v for g in range(globals_number) for v in range(crops_number))
    assert pairs_number(globals_number, crops_number) == number
    ones = torch.ones(crops_number, B, K)
    assert mean_product(ones[:globals_number], ones).item() == pytest.approx(K)


# --------------------------------------------------------------------------- cross-entropy, KL, entropy: closed forms


def test_uniform_targets_and_student_cost_ln_k() -> None:
    uniform = torch.full((2, B, K), 1 / K)
    student = torch.full((5, B, K), -math.log(K))
    assert cross_entropy(uniform, student).item() == pytest.approx(math.log(K), rel=1e-6)
    assert entropy(uniform).item() == pytest.approx(math.log(K), rel=1e-6)
    assert kl_divergence(uniform, student).item() == pytest.approx(0, abs=1e-6)


def test_uniform_targets_cost_the_mean_negative_log_probability() -> None:
    probs = log_probs(2)
    assert cross_entropy(torch.full((2, B, K), 1 / K), probs).item() == pytest.approx(-probs.mean().item())


def test_one_hot_targets_cost_the_negative_log_probability_of_their_prototype() -> None:
    probs = log_probs(3)
    targets = F.one_hot(torch.tensor([[1] * B, [2] * B]), K).double()
    # Target 0 meets crops 1 and 2, target 1 meets crops 0 and 2.
    met = torch.stack([probs[1, :, 1], probs[2, :, 1], probs[0, :, 2], probs[2, :, 2]])
    for loss in (cross_entropy, kl_divergence):
        assert loss(targets, probs).item() == pytest.approx(-met.mean().item())
    assert entropy(targets) == 0


def test_one_hot_targets_that_the_student_meets_cost_nothing() -> None:
    targets = F.one_hot(torch.zeros(2, B, dtype=torch.long), K).float()
    student = (targets * 100).log_softmax(dim=-1)
    assert cross_entropy(targets, student).item() == pytest.approx(0, abs=1e-6)
    assert kl_divergence(targets, student).item() == pytest.approx(0, abs=1e-6)


def test_a_crop_is_not_compared_with_itself() -> None:
    targets, probs = log_probs(2, seed=1).exp(), log_probs(2).requires_grad_()
    cross_entropy(targets, probs).backward()
    torch.testing.assert_close(probs.grad, -targets.flip(0) / (2 * B))


@each_number_of_crops
@pytest.mark.parametrize("temp", [1e-3, 0.04, 1.0])
def test_cross_entropy_is_entropy_plus_kl(temp: float, globals_number: int, crops_number: int) -> None:
    targets, probs = (random(globals_number, seed=1) / temp).softmax(dim=-1), log_probs(crops_number)
    parts = entropy(targets) + kl_divergence(targets, probs)
    assert parts.item() == pytest.approx(cross_entropy(targets, probs).item(), abs=1e-12)


def test_entropy_and_kl_have_no_gradient() -> None:
    targets, probs = log_probs(2, seed=1).exp().requires_grad_(), log_probs(2).requires_grad_()
    assert not entropy(targets).requires_grad
    assert not kl_divergence(targets, probs).requires_grad


# ------------------------------------------------------------------------------- MSE, cosine, InfoNCE: closed forms


@each_number_of_crops
def test_mse_is_two_plus_twice_cosine_and_so_is_its_gradient(globals_number: int, crops_number: int) -> None:
    targets = units(globals_number, seed=1)
    gradients, losses = [], []
    for loss in (MSE(), Cosine()):
        student = random(crops_number).requires_grad_()
        value = loss.between(targets, F.normalize(student, dim=-1))
        value.backward()
        losses.append(value.item())
        gradients.append(student.grad)
    assert losses[0] == pytest.approx(2 + 2 * losses[1], abs=1e-12)
    torch.testing.assert_close(gradients[0], 2 * gradients[1])


@pytest.mark.parametrize(("sign", "mse", "cosine"), [(1, 0, -1), (-1, 4, 1)])
def test_mse_and_cosine_are_at_their_bounds_for_equal_and_opposite_vectors(sign: int, mse: int, cosine: int) -> None:
    targets = units(1).expand(2, -1, -1)
    outputs = sign * units(1).expand(5, -1, -1)
    assert MSE().between(targets, outputs).item() == pytest.approx(mse, abs=1e-12)
    assert Cosine().between(targets, outputs).item() == pytest.approx(cosine, abs=1e-12)


def test_orthogonal_vectors_have_mse_two_and_cosine_zero() -> None:
    axes = F.one_hot(torch.arange(8).view(2, B), K).double()
    assert MSE().between(axes, axes).item() == 2
    assert Cosine().between(axes, axes).item() == 0


@each_comparison
def test_the_gradient_of_a_crop_comes_from_the_targets_of_other_crops(loss: MSE | Cosine | InfoNCE) -> None:
    outputs = units(2).requires_grad_()
    gradients = []
    for changed in (0, 1):
        targets = units(2, seed=1)
        targets[changed] = units(1, seed=2)[0]
        gradients.append(torch.autograd.grad(loss.between(targets, outputs), outputs)[0])
    unchanged = torch.autograd.grad(loss.between(units(2, seed=1), outputs), outputs)[0]
    for changed in (0, 1):
        torch.testing.assert_close(gradients[changed][changed], unchanged[changed], rtol=0, atol=1e-14)
        assert not torch.allclose(gradients[changed][1 - changed], unchanged[1 - changed])


@pytest.mark.parametrize("temp", [0.07, 0.2, 1.0])
def test_info_nce_of_equal_targets_is_ln_b(temp: float) -> None:
    targets = units(1)[:, :1].expand(2, B, -1)
    assert InfoNCE(temp=temp).between(targets, units(5)).item() == pytest.approx(math.log(B), abs=1e-12)


@pytest.mark.parametrize("temp", [0.07, 0.2, 1.0])
def test_info_nce_of_images_at_right_angles(temp: float) -> None:
    axes = F.one_hot(torch.arange(B), K).double()
    met = InfoNCE(temp=temp).between(axes.expand(2, -1, -1), axes.expand(5, -1, -1)).item()
    assert met == pytest.approx(math.log(1 + (B - 1) * math.exp(-1 / temp)), abs=1e-12)
    # The student takes each image for the next one.
    mistaken = InfoNCE(temp=temp).between(axes.expand(2, -1, -1), axes.roll(1, dims=0).expand(5, -1, -1)).item()
    assert mistaken == pytest.approx(1 / temp + math.log(1 + (B - 1) * math.exp(-1 / temp)), abs=1e-12)


@each_comparison
def test_a_loss_stays_float32_where_matrix_products_are_not(loss: MSE | Cosine | InfoNCE) -> None:
    targets, outputs = units(2, seed=1).float(), units(5).float()
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss.between(targets, outputs)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(loss.between(targets, outputs).item(), abs=1e-6)


# --------------------------------------------------------------------------------------------------- temperatures


@pytest.mark.parametrize("epochs", [0, 1, 2, 5])
def test_the_teachers_temperature_is_the_references(epochs: int) -> None:
    loss = CrossEntropy(teacher_temp=0.07, warmup_teacher_temp=0.02, warmup_teacher_temp_epochs=epochs)
    reference = np.concatenate([np.linspace(0.02, 0.07, epochs), np.full(8 - epochs, 0.07)])
    assert [loss.teacher_temp_at(epoch) for epoch in range(8)] == pytest.approx(reference)
    assert all(before <= after for before, after in pairwise(reference))


def test_without_sharpening_the_teachers_temperature_is_the_students() -> None:
    loss = CrossEntropy(sharpening=False, student_temp=0.3, teacher_temp=0.0, warmup_teacher_temp_epochs=4)
    assert [loss.teacher_temp_at(epoch) for epoch in (0, 1, 9)] == [0.3] * 3
