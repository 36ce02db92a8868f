"""DINO against a version written from the paper with plain loops, and against lightly's."""

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from lightly.loss import DINOLoss

from dino_lab.core import records
from dino_lab.core.optimizers import AdamW, set_schedule

from .plain import MLP_HEAD, PREDICTOR, SETTINGS, PlainDINO, build, build_float64, close, reference_optimizer
from .small import BACKBONE, B, batch, now, same, shapes_seen, state, take_step

# ------------------------------------------------------------------------------------ the paper, in plain loops


class Case(NamedTuple):
    changes: dict[str, Any]
    global_crops: int = 2
    local_crops: int = 1
    steps_per_epoch: int = 1


def momentum(start: float, end: float | None = None) -> dict[str, float]:
    return {"teacher.momentum_teacher": start, "teacher.momentum_teacher_end": start if end is None else end}


CASES = {
    "defaults": Case(momentum(0.996, 1.0), local_crops=2),
    "momentum that falls": Case(momentum(0.9, 0.1)),
    "hot teacher": Case({"loss.teacher_temp": 0.07, "loss.student_temp": 0.2}),
    "warm-up": Case(
        {"loss.teacher_temp": 0.07, "loss.warmup_teacher_temp_epochs": 3} | momentum(0.5),
        local_crops=2,
    ),
    "warm-up of two steps an epoch": Case(
        {"loss.teacher_temp": 0.07, "loss.warmup_teacher_temp_epochs": 2}, steps_per_epoch=2
    ),
    "arg-max teacher": Case({"loss.teacher_temp": 0.0}),
    "quick centre": Case({"operation.center_momentum": 0.1}, local_crops=2),
    "held centre": Case({"operation.center_momentum": 1.0}),
    "copied teacher": Case({"operation.center_momentum": 0.0} | momentum(0.0)),
    "held teacher": Case(momentum(1.0)),
    "two crops": Case({}, local_crops=0),
    "one local crop": Case({}),
    "three local crops": Case({}, local_crops=3),
    "three global crops": Case({}, global_crops=3, local_crops=0),
    "three and one": Case({}, global_crops=3),
    "no sharpening": Case({"loss.sharpening": False}),
    "no centring": Case({"operation.kind": "none"}),
    "softmax over the batch": Case({"operation.kind": "softmax_batch"}),
    "sinkhorn": Case({"operation.kind": "sinkhorn"}),
    "sinkhorn of one iteration": Case({"operation.kind": "sinkhorn", "operation.iterations": 1}),
    "mse": Case({"loss.kind": "mse"}, local_crops=2),
    "mse without centring": Case({"loss.kind": "mse", "operation.kind": "none"}),
    "cosine": Case({"loss.kind": "cosine"}, global_crops=3),
    "info_nce": Case({"loss.kind": "info_nce"}, local_crops=2),
    "info_nce of two crops": Case({"loss.kind": "info_nce", "loss.temp": 0.07}, local_crops=0),
    "teacher is the student": Case({"teacher.kind": "student_copy"}),
    "teacher of the previous iteration": Case({"teacher.kind": "previous_iteration"}),
    "teacher of the previous epoch": Case({"teacher.kind": "previous_epoch"}, steps_per_epoch=2),
    "predictor": Case(PREDICTOR),
    "predictor without batch norm": Case(PREDICTOR | {"predictor.batch_norm": False, "predictor.activation": "gelu"}),
    "predictor, mse and mlp head": Case(PREDICTOR | MLP_HEAD | {"loss.kind": "mse"}),
    "batch norm in the head": Case({"head.batch_norm": True}, local_crops=2),
    "relu head": Case({"head.activation": "relu"}),
    "head of one layer": Case({"head.layers_number": 1}),
    "mlp head": Case(MLP_HEAD),
    "mlp head without batch norm": Case(MLP_HEAD | {"head.batch_norm": False, "head.activation": "gelu"}),
    "learned lengths of prototypes": Case({"head.norm_last_layer": False}),
    "held last layer": Case({"head.freeze_last_layer_epochs": 1.0, "head.norm_last_layer": False}, steps_per_epoch=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_three_steps_are_those_of_the_paper(case: Case) -> None:
    settings = SETTINGS.but(case.changes)
    method = build_float64(settings)
    plain = PlainDINO(copy.deepcopy(method.student), settings)
    optimizer = AdamW(clip_grad=0.05)
    ours, theirs = optimizer.build(method.student), reference_optimizer(plain.student)

    for step in range(3):
        crops = batch(step, global_crops=case.global_crops, local_crops=case.local_crops, dtype=torch.float64)
        moment = now(step, steps_per_epoch=case.steps_per_epoch)
        outcome = method.loss(crops, moment)
        set_schedule(ours, lr=1e-3, weight_decay=0.1)
        ours.zero_grad()
        outcome.loss.backward()
        for parameter in method.held(moment):
            parameter.grad = None
        optimizer.clip(method.student.parameters())
        ours.step()
        method.after_step(moment)

        center_before = plain.center
        loss = plain.step(crops, step, steps_per_epoch=case.steps_per_epoch, optimizer=theirs, clip=0.05)

        close(outcome.loss, loss)
        close(outcome.measures[records.CENTER_NORM], center_before.norm())
        assert float(outcome.measures[records.CENTER_SHARE]) == pytest.approx(plain.center_share, rel=1e-5, abs=1e-6)
        if settings.loss.kind == "cross_entropy":
            close(outcome.measures[records.KL], plain.kl)
            close(outcome.measures[records.TEACHER_ENTROPY], plain.entropy)
            assert outcome.measures[records.TEACHER_TEMP] == pytest.approx(plain.teacher_temp)
        close(method.center, plain.center)
        for model, reference in ((method.student, plain.student), (method.teacher.network, plain.teacher)):
            theirs_by_name = dict(reference.named_parameters())
            for name, parameter in model.named_parameters():
                close(parameter, theirs_by_name[name])
                assert (parameter.grad is None) == (theirs_by_name[name].grad is None)
                if parameter.grad is not None:
                    close(parameter.grad, theirs_by_name[name].grad)


@pytest.mark.parametrize(
    ("changes", "global_crops", "local_crops"),
    [
        ({}, 2, 0),
        ({"loss.teacher_temp": 0.07, "loss.student_temp": 0.2}, 2, 3),
        ({"loss.teacher_temp": 0.07, "loss.warmup_teacher_temp_epochs": 4}, 2, 1),
        ({"operation.center_momentum": 0.3}, 3, 2),
    ],
)
def test_loss_and_centre_are_lightlys(changes: dict[str, Any], global_crops: int, local_crops: int) -> None:
    settings = SETTINGS.but(changes)
    method = build(settings)
    lightly = DINOLoss(
        settings.head.out_dim,
        warmup_teacher_temp=settings.loss.warmup_teacher_temp,
        teacher_temp=settings.loss.teacher_temp,
        warmup_teacher_temp_epochs=settings.loss.warmup_teacher_temp_epochs,
        student_temp=settings.loss.student_temp,
        center_momentum=settings.operation.center_momentum,
    )
    for epoch in range(5):
        crops = batch(epoch, global_crops=global_crops, local_crops=local_crops)
        with torch.no_grad():
            teacher_out, _ = method.teacher([crops.global_crops])
            student_out, _ = method.student([crops.global_crops, crops.local_crops])
            theirs = lightly(list(teacher_out), list(student_out), epoch=epoch)
        moment = now(epoch, steps_per_epoch=1)
        ours = method.loss(crops, moment)
        method.after_step(moment)
        close(ours.loss, theirs)
        close(method.center, lightly.center.flatten())
        with torch.no_grad():  # else teacher and student stay the same
            for parameter in method.student.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(epoch)))


# ----------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("global_crops", "local_crops"), [(2, 0), (2, 3), (3, 1)])
@pytest.mark.parametrize(
    ("operation", "teacher_temp"),
    [
        *itertools.product(["centering", "none", "softmax_batch", "sinkhorn"], [0.01, 0.04, 1.0]),
        ("centering", 0.0),
        ("none", 0.0),
    ],
)
def test_loss_is_teacher_entropy_plus_kl(
    operation: str, teacher_temp: float, global_crops: int, local_crops: int
) -> None:
    method = build(SETTINGS.but({"operation.kind": operation, "loss.teacher_temp": teacher_temp}))
    with torch.no_grad():
        method.student.head.last_layer.weight_v.normal_(generator=torch.Generator().manual_seed(3))
    outcome = method.loss(batch(0, global_crops=global_crops, local_crops=local_crops), now())
    parts = outcome.measures[records.TEACHER_ENTROPY] + outcome.measures[records.KL]
    assert float(parts) == pytest.approx(outcome.loss.item(), abs=1e-5)
    assert float(outcome.measures[records.KL]) > 0


# ------------------------------------------------------------------------------------------------- invariants


def test_teacher_equals_student_at_the_start() -> None:
    method = build(SETTINGS.but(PREDICTOR | {"head.batch_norm": True}))
    assert same(state(method.teacher.network), state(method.student, without=("predictor",)))
    assert not {p.data_ptr() for p in method.teacher.parameters()} & {p.data_ptr() for p in method.student.parameters()}


def test_teacher_receives_no_gradient() -> None:
    method = build()
    method.loss(batch(0), now()).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
    assert method.center.grad is None


def test_teacher_sees_global_crops_only_and_the_student_all() -> None:
    method = build()
    seen = shapes_seen(method)
    method.loss(batch(0, global_crops=2, local_crops=3), now())
    assert seen == {"teacher": [(2 * B, 3, 16, 16)], "student": [(2 * B, 3, 16, 16), (3 * B, 3, 8, 8)]}


def test_features_are_the_teachers_of_global_crops() -> None:
    method = build()
    with torch.no_grad():  # else they would be the student's too
        method.teacher.network.backbone.vit.norm.bias.add_(1)
    crops = batch(0)
    features = method.loss(crops, now()).features
    assert not features.requires_grad
    for crop, ours in zip(crops.global_crops, features, strict=True):
        close(ours, method.teacher.network.backbone(crop))


def test_targets_do_not_depend_on_local_crops() -> None:
    method = build()
    crops = batch(0)
    targets = method.loss(crops, now()).targets
    assert torch.equal(method.loss(crops._replace(local_crops=crops.local_crops + 1), now()).targets, targets)


def test_the_loss_of_a_step_uses_the_centre_of_the_steps_before() -> None:
    method = build(SETTINGS.but({"operation.center_momentum": 0.0} | momentum(1.0)))
    with torch.no_grad():
        logits = [method.teacher([batch(seed).global_crops])[0] for seed in (0, 1, 2)]
    center = torch.zeros_like(method.center)
    for step in range(3):
        targets = method.loss(batch(step), now(step)).targets
        close(targets, ((logits[step] - center) / 0.04).softmax(dim=-1))
        assert torch.equal(method.center, center)
        method.after_step(now(step))
        center = method.center.clone()
        close(center, logits[step].mean(dim=(0, 1)))


def test_measuring_changes_neither_loss_nor_state() -> None:
    ends, losses = [], []
    for measured in (True, False):
        method = build()
        optimizer = reference_optimizer(method.student)
        for step in range(3):
            outcome = take_step(method, optimizer, step, measured=measured)
            losses.append(outcome.loss.item())
            assert bool(outcome.measures) == measured
        ends.append(state(method))
    assert same(*ends)
    assert losses[:3] == losses[3:]


@pytest.mark.parametrize("operation", ["none", "softmax_batch", "sinkhorn"])
def test_without_centring_the_centre_stays_at_zero(operation: str) -> None:
    method = build(SETTINGS.but({"operation.kind": operation}))
    for step in range(3):
        method.loss(batch(step), now(step))
        method.after_step(now(step))
    assert method.center.abs().max() == 0


def test_without_sharpening_the_teacher_has_the_students_temperature() -> None:
    changes = {"loss.sharpening": False, "loss.student_temp": 0.3, "loss.warmup_teacher_temp_epochs": 4}
    method = build(SETTINGS.but(changes))
    outcome = method.loss(batch(0), now())
    logits, _ = method.teacher([batch(0).global_crops])
    close(outcome.targets, (logits / 0.3).softmax(dim=-1))
    assert [method.settings.loss.teacher_temp_at(epoch) for epoch in (0, 1, 9)] == [0.3] * 3


def test_a_lower_teacher_temperature_sharpens_targets() -> None:
    methods = [build(SETTINGS.but({"loss.teacher_temp": temp})) for temp in (0.0, 0.02, 0.04, 0.1, 1.0)]
    entropies = [float(method.loss(batch(0), now()).measures[records.TEACHER_ENTROPY]) for method in methods]
    assert entropies[0] == 0
    assert all(sharp < flat for sharp, flat in itertools.pairwise(entropies))


def test_teacher_has_no_drop_path_and_the_student_has() -> None:
    method = build(backbone=BACKBONE.but({"drop_path_rate": 0.9}))
    crops = [batch(0).global_crops]
    for model, alike in ((method.teacher, True), (method.student, False)):
        first, second = model(crops)[0], model(crops)[0]
        assert torch.equal(first, second) == alike
    assert not method.teacher.network.training
    assert method.student.training
