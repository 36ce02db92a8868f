"""SwAV against plain loops in numpy and against a training loop with lightly's loss, in the order of main_swav.py."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import SwaVLoss
from lightly.loss.swav_loss import sinkhorn
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.methods.method import Batch
from dino_lab.core.methods.swav import SwAV, SwAVMethod, SwAVStudent
from dino_lab.core.networks.backbone import Backbone

from .small import (
    BACKBONE,
    SIZE,
    STATISTICS,
    STEPS,
    SURROUNDINGS,
    B,
    batch,
    cross_entropy_and_parts,
    now,
    pairs,
    plain_mlp,
    same,
    shapes_seen,
    softmax,
    state,
    take_step,
    take_steps,
    unit,
)

K = 12
SETTINGS = SwAV().but({"head.out_dim": 16, "head.hidden_dim": 32, "prototypes_number": K})
WITH_QUEUE = SETTINGS.but({"queue_size": B, "queue_start_epochs": 0.0})
WITHOUT_BATCH_NORM = SETTINGS.but({"head.batch_norm": False})


def method(settings: SwAV = SETTINGS, backbone: Backbone = BACKBONE) -> SwAVMethod:
    torch.manual_seed(0)
    return settings.build(backbone.build(SIZE), SURROUNDINGS)


def prototypes(swav: SwAVMethod) -> nn.Parameter:
    return swav.student.prototypes.weight


def scores_of(student: SwAVStudent, crops: Batch) -> Tensor:
    outputs, _ = student([crops.global_crops, crops.local_crops])
    return student.prototypes(F.normalize(outputs, dim=-1))


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
        x = torch.cat([swav.student.backbone(view) for view in views]).double()
        mlp = swav.student.head.mlp
        norm = [nn.BatchNorm1d] if swav.settings.head.batch_norm else []
        assert [type(layer) for layer in mlp] == [nn.Linear, *norm, nn.ReLU, nn.Linear]
        scores = unit(plain_mlp(mlp, x)) @ prototypes(swav).double().T
    return scores.view(len(views), B, K).numpy()


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
    all_codes = [
        plain_codes(crop, epsilon=settings.epsilon, iterations=settings.iterations) for crop in scores[:global_crops]
    ]
    terms = [
        cross_entropy_and_parts(all_codes[g][i], softmax(scores[v, i] / settings.temp))
        for g, v, i in pairs(global_crops, global_crops + local_crops)
    ]
    losses, entropies, divergences = zip(*terms, strict=True)
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
        scores = scores_of(swav.student, crops)
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
    weight = student.prototypes.weight
    lightly = SwaVLoss(settings.temp, settings.iterations, settings.epsilon)
    ours, theirs = (
        torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for each in (swav.student, student)
    )
    for step in range(4):
        crops = batch(step, global_crops=global_crops, local_crops=local_crops)
        outcome = take_step(swav, ours, step, crops)

        with torch.no_grad():
            weight.copy_(F.normalize(weight, dim=1))
        scores = scores_of(student, crops)
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
    scores = scores_of(swav.student, crops)
    log_probs = (scores / 0.1).log_softmax(dim=-1)
    terms = [-(outcome.targets[g, i] * log_probs[v, i]).sum() for g, v, i in pairs(2, 4)]
    torch.stack(terms).mean().backward()
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


# --------------------------------------------------------------------------------------------------------- queue


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("queue_size", [2 * B, 6])
def test_codes_and_queue_are_those_of_the_references_loop(queue_size: int, parts: int) -> None:
    """It begins to fill in the second step, and counts once it is full. Lightly evens it out with the batch."""
    swav = method(WITHOUT_BATCH_NORM.but({"queue_size": queue_size, "queue_start_epochs": 0.5}))
    optimizer = torch.optim.SGD(swav.student.parameters(), lr=1.0)
    queues: list[list[Tensor]] = [[], []]
    for step in range(6):
        crops = batch(step)
        with torch.no_grad():
            outputs, _ = swav.student([crops.global_crops])
            projections = F.normalize(outputs, dim=-1)
            weight = prototypes(swav).clone()
        codes = []
        for crop in range(2):
            full = len(queues[crop]) == queue_size
            of_part = []
            for part in projections[crop].chunk(parts):
                rows = torch.stack([*queues[crop], *part] if full else [*part])
                of_part.append(sinkhorn(rows @ weight.T, iterations=3, epsilon=0.05)[-len(part) :])
            codes.append(torch.cat(of_part))
        outcome = take_step(swav, optimizer, step, crops, parts=parts)
        torch.testing.assert_close(outcome.targets, torch.stack(codes), rtol=1e-4, atol=1e-6)
        if step >= 1:
            queues = [[*projections[crop], *queues[crop]][:queue_size] for crop in range(2)]
            for crop in range(2):
                filled = len(queues[crop])
                torch.testing.assert_close(swav.queue[crop, :filled], torch.stack(queues[crop]), rtol=1e-5, atol=1e-6)
                assert not swav.queue[crop, filled:].any()
    assert len(queues[0]) == queue_size


# ---------------------------------------------------------------------------------------------------- prototypes


def test_prototypes_have_no_bias_and_length_1_from_the_start_and_after_each_step() -> None:
    swav = method(SETTINGS.but({"freeze_prototypes_epochs": 0.0}))
    assert swav.student.prototypes.bias is None
    optimizer = torch.optim.AdamW(swav.student.parameters(), lr=0.01)
    for step in range(4):
        torch.testing.assert_close(prototypes(swav).norm(dim=1), torch.ones(K))
        before = prototypes(swav).detach().clone()
        take_step(swav, optimizer, step)
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
    assert (settings.queue_size, settings.queue_start_epochs) == (0, 15.0)


def test_there_is_no_teacher() -> None:
    swav = method()
    assert list(swav.encoders()) == ["student"]
    assert swav.encoders()["student"] is swav.student.backbone
    assert all(name.startswith("student.") or name == "queue" for name in swav.state_dict())


def test_the_student_sees_all_crops_once() -> None:
    swav = method()
    seen = shapes_seen(swav)
    swav.loss(batch(0, local_crops=3), now())
    assert seen == {"student": [(2 * B, 3, 16, 16), (3 * B, 3, 8, 8)]}


def test_features_are_those_of_the_global_crops() -> None:
    swav, crops = method(), batch(0)
    with torch.no_grad():
        features = torch.stack([swav.student.backbone(crop) for crop in crops.global_crops])
    torch.testing.assert_close(swav.loss(crops, now()).features, features)


@pytest.mark.parametrize("settings", [SETTINGS, WITH_QUEUE], ids=["no queue", "queue"])
def test_the_loss_changes_no_state(settings: SwAV) -> None:
    swav = method(settings)
    swav.loss(batch(1), now())
    swav.after_step(now())
    before = state(swav, without=STATISTICS)
    first, second = (swav.loss(batch(0), now()).loss for _ in range(2))
    assert same(state(swav, without=STATISTICS), before)
    assert torch.equal(first, second)


@pytest.mark.parametrize("settings", [SETTINGS, WITH_QUEUE], ids=["no queue", "queue"])
def test_resumed_from_its_state_it_ends_at_the_same_bits(settings: SwAV) -> None:
    dropped = BACKBONE.but({"drop_path_rate": 0.5})
    whole, half, resumed = (method(settings, dropped) for _ in range(3))
    take_steps(whole, torch.optim.AdamW(whole.student.parameters()), range(6))
    first, second = (torch.optim.AdamW(each.student.parameters()) for each in (half, resumed))
    take_steps(half, first, range(3))
    resumed.load_state_dict(state(half))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(resumed, second, range(3, 6))
    assert same(state(resumed), state(whole))


@pytest.mark.parametrize("settings", [SETTINGS, WITH_QUEUE], ids=["no queue", "queue"])
def test_measuring_changes_no_state(settings: SwAV) -> None:
    ends = []
    for measured in (True, False):
        swav = method(settings)
        take_steps(swav, torch.optim.AdamW(swav.student.parameters()), range(3), measured=measured)
        ends.append(state(swav))
    assert same(*ends)
    assert method().loss(batch(0), now(measured=False)).measures == {}


@pytest.mark.parametrize("settings", [SETTINGS, WITH_QUEUE], ids=["no queue", "queue"])
def test_in_bf16_the_loss_is_float32_and_still_entropy_plus_kl(settings: SwAV) -> None:
    swav = method(settings)
    with torch.autocast("cpu", torch.bfloat16):
        swav.loss(batch(1), now())
        swav.after_step(now())
        outcome = swav.loss(batch(0), now())
    assert outcome.loss.dtype == outcome.features.dtype == outcome.targets.dtype == torch.float32
    parts = outcome.measures[records.TEACHER_ENTROPY] + outcome.measures[records.KL]
    assert float(parts) == pytest.approx(outcome.loss.item(), abs=1e-5)
