"""SwAV against plain loops in numpy and against a training loop with lightly's loss, in the order of main_swav.py."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import SwaVLoss
from lightly.loss.swav_loss import sinkhorn
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.methods.method import Batch, Surroundings
from dino_lab.core.methods.swav import SwAV, SwAVMethod
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.schedules import Now

B, K, STEPS = 4, 12, 6
BACKBONE = Backbone(name="vit_tiny_patch16_224", patch_size=8, embed_dim=24, depth=2, num_heads=3, drop_path_rate=0.0)
SETTINGS = SwAV().but({"head.out_dim": 16, "head.hidden_dim": 32, "prototypes_number": K})
WITHOUT_BATCH_NORM = SETTINGS.but({"head.batch_norm": False})


def method(settings: SwAV = SETTINGS, backbone: Backbone = BACKBONE) -> SwAVMethod:
    torch.manual_seed(0)
    return settings.build(backbone.build(16), Surroundings(3, image_size=16, trials_dir=Path()))


def batch(seed: int, *, global_crops: int = 2, local_crops: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(global_crops, B, 3, 16, 16, generator=generator),
        torch.randn(local_crops, B, 3, 8, 8, generator=generator),
        torch.zeros(B, dtype=torch.long),
    )


def now(step: int = 0, *, measured: bool = True) -> Now:
    return Now(step, steps=STEPS, steps_per_epoch=2, measured=measured)


def prototypes(swav: SwAVMethod) -> nn.Parameter:
    return swav.student.head.prototypes.weight


def state(swav: nn.Module) -> dict[str, Tensor]:
    """All but the running statistics of batch normalisation, which any forward pass in training moves."""
    running = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.clone() for name, value in swav.state_dict().items() if not name.endswith(running)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CASES = [
    ({}, 2, 0),
    ({}, 2, 3),
    ({"temp": 0.3, "epsilon": 0.2}, 3, 1),
    ({"iterations": 1}, 2, 1),
    ({"iterations": 10, "epsilon": 0.03}, 3, 0),
    ({"head.batch_norm": False}, 2, 2),
]


# ---------------------------------------------------------------------------------------------- the paper's loss


def plain_scores(swav: SwAVMethod, crops: Batch) -> np.ndarray:
    """The head written out: linear, batch normalisation over all crops, ReLU, linear, length 1, prototypes. [V B K]"""
    views = [*crops.global_crops, *crops.local_crops]
    with torch.no_grad():
        x = torch.cat([swav.student.backbone(view) for view in views]).double().numpy()
    first, *norm, _, last = swav.student.head.projection.mlp
    x = x @ first.weight.detach().double().numpy().T + first.bias.detach().double().numpy()
    if norm:
        x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + norm[0].eps)
    x = np.maximum(x, 0) @ last.weight.detach().double().numpy().T + last.bias.detach().double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return (x @ prototypes(swav).detach().double().numpy().T).reshape(len(views), B, K)


def plain_codes(scores: np.ndarray, *, epsilon: float, iterations: int) -> np.ndarray:
    """Sinkhorn-Knopp with a loop for every index: prototypes share the images equally, then images sum to one share."""
    q = [[math.exp(scores[i, k] / epsilon) for i in range(B)] for k in range(K)]
    for _ in range(iterations):
        for k in range(K):
            total = sum(q[k])
            q[k] = [value / total / K for value in q[k]]
        for i in range(B):
            total = sum(q[k][i] for k in range(K))
            for k in range(K):
                q[k][i] /= total * B
    return B * np.array(q).T


@pytest.mark.parametrize(("knobs", "global_crops", "local_crops"), CASES)
def test_loss_and_measures_are_those_of_plain_loops(
    knobs: dict[str, float], global_crops: int, local_crops: int
) -> None:
    settings = SETTINGS.but(knobs)
    swav, crops = method(settings), batch(0, global_crops=global_crops, local_crops=local_crops)
    scores = plain_scores(swav, crops)
    losses, entropies, divergences = [], [], []
    for g in range(global_crops):
        codes = plain_codes(scores[g], epsilon=settings.epsilon, iterations=settings.iterations)
        for v in range(global_crops + local_crops):
            if v == g:
                continue
            for i in range(B):
                total = sum(math.exp(score / settings.temp) for score in scores[v, i])
                p = [math.exp(score / settings.temp) / total for score in scores[v, i]]
                losses.append(-sum(codes[i, k] * math.log(p[k]) for k in range(K)))
                entropies.append(-sum(codes[i, k] * math.log(codes[i, k]) for k in range(K)))
                divergences.append(sum(codes[i, k] * math.log(codes[i, k] / p[k]) for k in range(K)))
    outcome = swav.loss(crops, now())
    assert outcome.loss.item() == pytest.approx(np.mean(losses), abs=1e-4)
    assert float(outcome.measures[records.TEACHER_ENTROPY]) == pytest.approx(np.mean(entropies), abs=1e-4)
    assert float(outcome.measures[records.KL]) == pytest.approx(np.mean(divergences), abs=1e-4)
    parts = outcome.measures[records.TEACHER_ENTROPY] + outcome.measures[records.KL]
    assert float(parts) == pytest.approx(outcome.loss.item(), abs=1e-5)


@pytest.mark.parametrize(("knobs", "global_crops", "local_crops"), CASES)
def test_codes_are_lightlys(knobs: dict[str, float], global_crops: int, local_crops: int) -> None:
    settings = SETTINGS.but(knobs)
    swav, crops = method(settings), batch(0, global_crops=global_crops, local_crops=local_crops)
    with torch.no_grad():
        scores, _ = swav.student([crops.global_crops, crops.local_crops])
    codes = [sinkhorn(crop, iterations=settings.iterations, epsilon=settings.epsilon) for crop in scores[:global_crops]]
    torch.testing.assert_close(swav.loss(crops, now()).targets, torch.stack(codes), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("freeze_prototypes_epochs", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("knobs", "global_crops", "local_crops"), CASES)
def test_steps_are_those_of_a_loop_with_lightlys_loss(
    knobs: dict[str, float], global_crops: int, local_crops: int, freeze_prototypes_epochs: float
) -> None:
    settings = SETTINGS.but(knobs | {"freeze_prototypes_epochs": freeze_prototypes_epochs})
    swav = method(settings)
    student = copy.deepcopy(swav.student)
    weight = student.head.prototypes.weight
    lightly = SwaVLoss(settings.temp, settings.iterations, settings.epsilon)
    ours, theirs = (
        torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for each in (swav.student, student)
    )
    for step in range(4):
        crops = batch(step, global_crops=global_crops, local_crops=local_crops)
        outcome = swav.loss(crops, now(step))
        ours.zero_grad()
        outcome.loss.backward()
        for parameter in swav.held(now(step)):
            parameter.grad = None
        ours.step()
        swav.after_step(now(step))

        with torch.no_grad():
            weight.copy_(F.normalize(weight, dim=1))
        scores, _ = student([crops.global_crops, crops.local_crops])
        loss = lightly(list(scores[:global_crops]), list(scores[global_crops:]))
        theirs.zero_grad()
        loss.backward()
        if step < freeze_prototypes_epochs * 2:
            weight.grad = None
        theirs.step()

        torch.testing.assert_close(outcome.loss, loss[0], rtol=1e-4, atol=1e-5)
        for name, parameter in student.named_parameters():
            expected = F.normalize(parameter, dim=1) if parameter is weight else parameter
            torch.testing.assert_close(swav.student.get_parameter(name), expected, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- codes


def test_codes_are_distributions_and_share_the_images_among_the_prototypes() -> None:
    codes = method(SETTINGS.but({"iterations": 300, "epsilon": 0.1})).loss(batch(0), now()).targets
    torch.testing.assert_close(codes.sum(dim=-1), torch.ones(2, B))
    torch.testing.assert_close(codes.sum(dim=1), torch.full((2, K), B / K), rtol=1e-3, atol=1e-3)


def test_codes_of_a_crop_do_not_depend_on_other_crops() -> None:
    swav, crops = method(WITHOUT_BATCH_NORM), batch(0)
    codes = swav.loss(crops, now()).targets
    other = batch(1)
    changed = crops._replace(
        global_crops=torch.stack([crops.global_crops[0], other.global_crops[1]]), local_crops=other.local_crops
    )
    torch.testing.assert_close(swav.loss(changed, now()).targets[0], codes[0])
    assert not torch.allclose(swav.loss(changed, now()).targets[1], codes[1])


def test_codes_get_no_gradient() -> None:
    swav, crops = method(WITHOUT_BATCH_NORM), batch(0)
    outcome = swav.loss(crops, now())
    assert not outcome.targets.requires_grad
    assert not outcome.features.requires_grad
    outcome.loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in swav.student.named_parameters()}
    swav.zero_grad()
    scores, _ = swav.student([crops.global_crops, crops.local_crops])
    log_probs = (scores / 0.1).log_softmax(dim=-1)
    pairs = [-(outcome.targets[g] * log_probs[v]).sum(dim=-1).mean() for g in range(2) for v in range(4) if g != v]
    torch.stack(pairs).mean().backward()
    for name, parameter in swav.student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_equal_scores_make_uniform_codes_and_cost_ln_k() -> None:
    swav = method()
    with torch.no_grad():
        prototypes(swav).copy_(prototypes(swav)[:1].expand(K, -1))
    outcome = swav.loss(batch(0), now())
    torch.testing.assert_close(outcome.targets, torch.full((2, B, K), 1 / K))
    assert outcome.loss.item() == pytest.approx(math.log(K), abs=1e-5)
    assert float(outcome.measures[records.KL]) == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------------------------------------------- prototypes


def test_prototypes_have_no_bias_and_length_1_from_the_start_and_after_each_step() -> None:
    swav = method(SETTINGS.but({"freeze_prototypes_epochs": 0.0}))
    assert swav.student.head.prototypes.bias is None
    optimizer = torch.optim.AdamW(swav.student.parameters(), lr=0.01)
    for step in range(4):
        torch.testing.assert_close(prototypes(swav).norm(dim=1), torch.ones(K))
        before = prototypes(swav).detach().clone()
        trained(swav, optimizer, range(step, step + 1))
        assert (prototypes(swav) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("epochs", "steps"), [(0.0, []), (0.5, [0]), (1.0, [0, 1]), (1.5, [0, 1, 2])])
def test_prototypes_are_held_for_the_first_epochs(epochs: float, steps: list[int]) -> None:
    swav = method(SETTINGS.but({"freeze_prototypes_epochs": epochs}))
    held = [list(swav.held(now(step))) for step in range(STEPS)]
    assert [step for step in range(STEPS) if held[step]] == steps
    assert all(len(each) == 1 and each[0] is prototypes(swav) for each in held if each)


# ---------------------------------------------------------------------------------------------------- invariants


def test_published_settings_are_the_defaults() -> None:
    settings = SwAV()
    assert (settings.head.hidden_dim, settings.head.out_dim, settings.head.batch_norm) == (2048, 128, True)
    assert (settings.prototypes_number, settings.freeze_prototypes_epochs) == (3000, 1.0)
    assert (settings.temp, settings.epsilon, settings.iterations) == (0.1, 0.05, 3)


def test_there_is_no_teacher() -> None:
    swav = method()
    assert list(swav.encoders()) == ["student"]
    assert swav.encoders()["student"] is swav.student.backbone
    assert all(name.startswith("student.") for name in swav.state_dict())


def test_the_student_sees_all_crops_once() -> None:
    swav, seen = method(), []
    swav.student.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    swav.loss(batch(0, local_crops=3), now())
    assert seen == [(2 * B, 3, 16, 16), (3 * B, 3, 8, 8)]


def test_features_are_those_of_the_global_crops() -> None:
    swav, crops = method(), batch(0)
    with torch.no_grad():
        features = torch.stack([swav.student.backbone(crop) for crop in crops.global_crops])
    torch.testing.assert_close(swav.loss(crops, now()).features, features)


def test_the_loss_changes_no_state() -> None:
    swav = method()
    before = state(swav)
    first, second = (swav.loss(batch(0), now()).loss for _ in range(2))
    assert same(state(swav), before)
    assert torch.equal(first, second)


def trained(swav: SwAVMethod, optimizer: torch.optim.Optimizer, steps: range, *, measured: bool = True) -> None:
    for step in steps:
        torch.manual_seed(step)  # of drop path, as the trainer does
        optimizer.zero_grad()
        swav.loss(batch(step), now(step, measured=measured)).loss.backward()
        for parameter in swav.held(now(step)):
            parameter.grad = None
        optimizer.step()
        swav.after_step(now(step))


def test_resumed_from_its_state_it_ends_at_the_same_bits() -> None:
    dropped = BACKBONE.but({"drop_path_rate": 0.5})
    whole, half, resumed = (method(backbone=dropped) for _ in range(3))
    trained(whole, torch.optim.AdamW(whole.student.parameters()), range(6))
    first, second = (torch.optim.AdamW(each.student.parameters()) for each in (half, resumed))
    trained(half, first, range(3))
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    trained(resumed, second, range(3, 6))
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_measuring_changes_no_state() -> None:
    ends = []
    for measured in (True, False):
        swav = method()
        trained(swav, torch.optim.AdamW(swav.student.parameters()), range(3), measured=measured)
        ends.append(dict(swav.state_dict()))
    assert same(*ends)
    assert method().loss(batch(0), now(measured=False)).measures == {}


def test_in_bf16_the_loss_is_float32_and_still_entropy_plus_kl() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outcome = method().loss(batch(0), now())
    assert outcome.loss.dtype == outcome.features.dtype == outcome.targets.dtype == torch.float32
    parts = outcome.measures[records.TEACHER_ENTROPY] + outcome.measures[records.KL]
    assert float(parts) == pytest.approx(outcome.loss.item(), abs=1e-5)
