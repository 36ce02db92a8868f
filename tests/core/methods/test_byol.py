"""BYOL against plain loops in numpy and against a training loop with lightly's loss."""

import copy
import math

import numpy as np
import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.diagnostics import signals
from dino_lab.core.methods.byol import BYOL, BYOLMethod
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import Momentum

from .small import (
    BACKBONE,
    SIZE,
    STATISTICS,
    STEPS,
    SURROUNDINGS,
    B,
    batch,
    moved,
    now,
    pairs,
    plain_mlp,
    same,
    shapes_seen,
    state,
    take_step,
    take_steps,
    unit,
)

K = 16
SETTINGS = BYOL().but({"head.out_dim": K, "head.hidden_dim": 32, "predictor.hidden_dim": 32})
ALONE = SETTINGS.but({"predictor.kind": "none"})


def method(settings: BYOL = SETTINGS, backbone: Backbone = BACKBONE) -> BYOLMethod:
    torch.manual_seed(0)
    return settings.build(backbone.build(SIZE), SURROUNDINGS)


# ---------------------------------------------------------------------------------------------- the paper's loss


def plain_outputs(network: Network, groups: list[Tensor]) -> np.ndarray:
    """Head and predictor written out: linear, batch normalisation over all crops, ReLU, linear. [V B K]"""
    with torch.no_grad():
        features = [network.backbone(crop) for crops in groups for crop in crops]
        x = torch.cat(features).double()
        for mlp in (network.head.mlp, network.predictor):
            if mlp is not None:
                assert [type(layer) for layer in mlp] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
                x = plain_mlp(mlp, x)
    return x.view(len(features), -1, x.shape[-1]).numpy()


@pytest.mark.parametrize("settings", [SETTINGS, ALONE], ids=["predictor", "no predictor"])
@pytest.mark.parametrize(("global_crops", "local_crops"), [(2, 0), (2, 3), (3, 1)])
def test_loss_and_outputs_are_those_of_plain_loops(settings: BYOL, global_crops: int, local_crops: int) -> None:
    byol = moved(method(settings))
    crops = batch(0, global_crops=global_crops, local_crops=local_crops)
    teacher = plain_outputs(byol.teacher.network, [crops.global_crops])
    student = plain_outputs(byol.student, [crops.global_crops, crops.local_crops])
    distances = []
    for g, v, i in pairs(global_crops, global_crops + local_crops):
        z, q = unit(teacher[g, i]), unit(student[v, i])
        distances.append(sum((q[k] - z[k]) ** 2 for k in range(K)))
    outcome = byol.loss(crops, now())
    assert outcome.loss.item() == pytest.approx(np.mean(distances), abs=1e-5)
    np.testing.assert_allclose(outcome.outputs.numpy(), unit(teacher), atol=1e-5)


@pytest.mark.parametrize("settings", [SETTINGS, ALONE], ids=["predictor", "no predictor"])
@pytest.mark.parametrize(("global_crops", "local_crops"), [(2, 0), (2, 2), (3, 1)])
def test_steps_are_those_of_a_loop_with_lightlys_loss(settings: BYOL, global_crops: int, local_crops: int) -> None:
    byol = method(settings.but({"teacher.momentum_teacher": 0.9}))
    student = copy.deepcopy(byol.student)
    teacher = copy.deepcopy(Network(student.backbone, student.head))
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (byol.student, student))
    similarity = NegativeCosineSimilarity()

    for step in range(3):
        crops = batch(step, global_crops=global_crops, local_crops=local_crops)
        outcome = take_step(byol, ours, step, crops)

        with torch.no_grad():
            targets, _ = teacher([crops.global_crops])
        predictions, _ = student([crops.global_crops, crops.local_crops])
        # |a - b|^2 = 2 - 2 cos(a, b)
        distances = [
            2 + 2 * similarity(prediction, target)
            for g, target in enumerate(targets)
            for v, prediction in enumerate(predictions)
            if g != v
        ]
        loss = sum(distances) / len(distances)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        tau = 1 - (1 - 0.9) * (math.cos(math.pi * step / STEPS) + 1) / 2  # BYOL's own formula
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                parameter.copy_(tau * parameter + (1 - tau) * student.get_parameter(name))

        torch.testing.assert_close(outcome.loss, loss, rtol=1e-4, atol=1e-5)
        assert outcome.measures[records.MOMENTUM_TEACHER] == pytest.approx(tau)
        for model, reference in ((byol.student, student), (byol.teacher.network, teacher)):
            for name, parameter in reference.named_parameters():
                torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- closed forms


def test_equal_crops_cost_nothing_without_a_predictor_and_something_with_one() -> None:
    crop = batch(0, global_crops=1, local_crops=0)
    crops = crop._replace(global_crops=crop.global_crops.repeat(2, 1, 1, 1, 1))
    assert method(ALONE).loss(crops, now()).loss.item() == pytest.approx(0, abs=1e-5)
    assert method().loss(crops, now()).loss.item() > 0.5


def test_opposite_outputs_cost_four() -> None:
    byol = method(ALONE.but({"head.batch_norm": False}))
    with torch.no_grad():
        for network, value in ((byol.student, 1.0), (byol.teacher.network, -1.0)):
            network.head.mlp[-1].weight.zero_()
            network.head.mlp[-1].bias.fill_(value)
    assert byol.loss(batch(0), now()).loss.item() == pytest.approx(4)


def test_without_a_predictor_the_outputs_collapse_and_with_one_they_do_not() -> None:
    """Rows 7 and 8 of DINO's Table 14, in small."""
    spreads = []
    for settings in (SETTINGS, ALONE):
        byol = method(settings.but({"teacher.momentum_teacher": 0.9, "teacher.momentum_teacher_end": 0.9}))
        optimizer = torch.optim.AdamW(byol.student.parameters(), lr=3e-3)
        for step in range(60):
            outcome = take_step(byol, optimizer, step, batch(step, images=8, local_crops=0))
        spreads.append(float(signals.spread(outcome.outputs)))
    predicting, alone = spreads
    assert predicting > 0.6
    assert alone < 0.2


# ---------------------------------------------------------------------------------------------------- invariants


def test_published_settings_are_the_defaults() -> None:
    settings = BYOL()
    assert (settings.head.hidden_dim, settings.head.out_dim, settings.head.batch_norm) == (4096, 256, True)
    assert (settings.predictor.hidden_dim, settings.predictor.batch_norm) == (4096, True)
    assert settings.teacher == Momentum(momentum_teacher=0.996, momentum_teacher_end=1.0)


def test_teacher_starts_as_the_student_and_has_no_predictor() -> None:
    byol = method()
    ours, students = dict(byol.teacher.network.named_parameters()), dict(byol.student.named_parameters())
    assert {name for name in students if name not in ours} == {
        name for name in students if name.startswith("predictor.")
    }
    assert byol.teacher.network.predictor is None
    assert all(torch.equal(ours[name], students[name]) for name in ours)
    assert not {p.data_ptr() for p in ours.values()} & {p.data_ptr() for p in students.values()}


def test_gradient_reaches_the_student_and_its_predictor_and_never_the_teacher() -> None:
    byol = method()
    outcome = byol.loss(batch(0), now())
    outcome.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in byol.teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in byol.student.predictor.parameters())
    assert all(p.grad is not None for p in byol.student.parameters())
    assert not outcome.features.requires_grad
    assert not outcome.outputs.requires_grad


def test_a_moved_predictor_leaves_the_teacher_where_it_was() -> None:
    crops, outputs, teachers = batch(0), [], []
    for push in (0.0, 1.0):
        byol = method()
        with torch.no_grad():
            for parameter in byol.student.predictor.parameters():
                parameter.add_(push)
        byol.after_step(now())
        teachers.append(state(byol.teacher))
        outputs.append(byol.loss(crops, now()).outputs)
    assert same(*teachers)
    assert torch.equal(*outputs)


def test_teacher_sees_global_crops_only_and_the_student_all() -> None:
    byol = method()
    seen = shapes_seen(byol)
    byol.loss(batch(0, local_crops=3), now())
    assert seen == {"teacher": [(2 * B, 3, 16, 16)], "student": [(2 * B, 3, 16, 16), (3 * B, 3, 8, 8)]}


def test_features_are_those_of_the_teacher() -> None:
    byol = moved(method())
    crops = batch(0)
    features = torch.stack([byol.teacher.network.backbone(crop) for crop in crops.global_crops])
    torch.testing.assert_close(byol.loss(crops, now()).features, features)


def test_the_loss_changes_no_state() -> None:
    byol = method()
    before = state(byol, without=STATISTICS)
    first, second = (byol.loss(batch(0), now()).loss for _ in range(2))
    assert same(state(byol, without=STATISTICS), before)
    assert torch.equal(first, second)


def test_parts_of_a_batch_cost_together_what_the_batch_costs() -> None:
    byol = moved(method(SETTINGS.but({"head.batch_norm": False, "predictor.batch_norm": False})))
    crops = batch(0)
    parts = [byol.loss(part, now()) for part in crops.split(2)]
    whole = byol.loss(crops, now())
    torch.testing.assert_close(sum(part.loss for part in parts) / 2, whole.loss)
    torch.testing.assert_close(torch.cat([part.outputs for part in parts], dim=1), whole.outputs)


def test_resumed_from_its_state_it_ends_at_the_same_bits() -> None:
    dropped = BACKBONE.but({"drop_path_rate": 0.5})
    whole, half, resumed = (method(backbone=dropped) for _ in range(3))
    take_steps(whole, torch.optim.AdamW(whole.student.parameters()), range(6))
    first, second = (torch.optim.AdamW(each.student.parameters()) for each in (half, resumed))
    take_steps(half, first, range(3))
    resumed.load_state_dict(state(half))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(resumed, second, range(3, 6))
    assert same(state(resumed), state(whole))


def test_measuring_changes_no_state() -> None:
    ends = []
    for measured in (True, False):
        byol = method()
        take_steps(byol, torch.optim.AdamW(byol.student.parameters()), range(3), measured=measured)
        ends.append(state(byol))
    assert same(*ends)
    assert method().loss(batch(0), now(measured=False)).measures == {}


def test_in_bf16_the_loss_is_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outcome = method().loss(batch(0), now())
    assert outcome.loss.dtype == outcome.features.dtype == outcome.outputs.dtype == torch.float32
    torch.testing.assert_close(outcome.outputs.norm(dim=-1), torch.ones(2, B))
