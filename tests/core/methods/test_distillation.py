"""Distillation against plain loops, and where its teacher comes from."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_lab.core import checkpoint, records
from dino_lab.core.diagnostics.collapse import Collapse, Verdict
from dino_lab.core.methods.distillation import Distillation, DistillationMethod
from dino_lab.core.methods.supervised import Supervised, SupervisedMethod
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.networks.head import BottleneckHeadSettings
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.weights import read_network
from dino_lab.core.settings import KnobError

from .small import (
    BACKBONE,
    CLASSES,
    SIZE,
    SURROUNDINGS,
    batch,
    cross_entropy_and_parts,
    now,
    pairs,
    same,
    softmax,
    state,
    take_step,
)

TRIAL = "0123456789"


def supervised(trials_dir: Path, *, backbone: Backbone = BACKBONE, classes_number: int = CLASSES) -> SupervisedMethod:
    """A teacher, kept in the lab as a finished trial of its own; surer of itself than one that is untrained."""
    torch.manual_seed(7)
    surroundings = SURROUNDINGS._replace(classes_number=classes_number)
    teacher = Supervised().build(backbone.build(SIZE), surroundings)
    with torch.no_grad():
        teacher.student.head.linear.weight.mul_(50)
    (trials_dir / TRIAL).mkdir(exist_ok=True)
    checkpoint.save(trials_dir / TRIAL / checkpoint.CHECKPOINT, {"step": 10, "method": teacher.state_dict()})
    return teacher


def method(
    trials_dir: Path, *, name: str = TRIAL, backbone: Backbone = BACKBONE, temp: float = 4.0
) -> DistillationMethod:
    torch.manual_seed(0)
    surroundings = SURROUNDINGS._replace(trials_dir=trials_dir)
    return Distillation(checkpoint=name, temp=temp).build(backbone.build(SIZE), surroundings)


@pytest.fixture
def distillation(tmp_path: Path) -> DistillationMethod:
    supervised(tmp_path)
    return method(tmp_path)


# ---------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("temp", [1.0, 4.0, 20.0])
@pytest.mark.parametrize(("global_crops", "local_crops"), [(2, 0), (2, 3), (3, 1)])
def test_loss_entropy_and_kl_are_those_of_plain_loops_over_pairs_of_different_crops(
    tmp_path: Path, temp: float, global_crops: int, local_crops: int
) -> None:
    teacher = supervised(tmp_path)
    distillation = method(tmp_path, temp=temp)
    crops = batch(global_crops=global_crops, local_crops=local_crops)

    def probs(network: Network, crop: Tensor) -> np.ndarray:
        with torch.no_grad():
            logits = network.head(network.backbone(crop[None]))[0].double().numpy()
        return softmax(logits / temp)

    views = [*crops.global_crops, *crops.local_crops]
    terms = [
        cross_entropy_and_parts(
            probs(teacher.student, crops.global_crops[g][i]), probs(distillation.student, views[v][i])
        )
        for g, v, i in pairs(global_crops, len(views))
    ]
    losses, entropies, divergences = zip(*terms, strict=True)

    outcome = distillation.loss(crops, now())
    assert outcome.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(outcome.measures[records.TEACHER_ENTROPY]) == pytest.approx(np.mean(entropies), rel=1e-5)
    assert float(outcome.measures[records.KL]) == pytest.approx(np.mean(divergences), rel=1e-3)
    assert outcome.measures[records.TEACHER_TEMP] == temp


def test_loss_is_teacher_entropy_plus_kl(distillation: DistillationMethod) -> None:
    outcome = distillation.loss(batch(), now())
    parts = outcome.measures[records.TEACHER_ENTROPY] + outcome.measures[records.KL]
    assert float(parts) == pytest.approx(outcome.loss.item(), abs=1e-5)


def test_labels_change_nothing(distillation: DistillationMethod) -> None:
    crops = batch()
    relabelled = crops._replace(labels=(crops.labels + 1) % CLASSES)
    assert distillation.loss(crops, now()).loss == distillation.loss(relabelled, now()).loss


def test_a_student_with_the_teachers_weights_has_only_the_difference_of_crops_to_learn(
    distillation: DistillationMethod,
) -> None:
    distillation.student.load_state_dict(distillation.teacher.state_dict())
    crops = batch(local_crops=0)
    alike = crops._replace(global_crops=crops.global_crops[:1].expand(2, -1, -1, -1, -1))
    assert float(distillation.loss(alike, now()).measures[records.KL]) == pytest.approx(0, abs=1e-6)
    assert float(distillation.loss(crops, now()).measures[records.KL]) > 1e-4


def test_targets_are_kept_from_the_verdict_which_would_call_a_good_teacher_uniform(
    distillation: DistillationMethod,
) -> None:
    assert distillation.loss(batch(), now()).targets is None
    # A teacher that has fully learned smoothed labels of 100 classes, and a student that is its equal.
    logits = torch.zeros(100)
    logits[0] = math.log(0.901 / 0.001)
    probs = (logits / 4.0).softmax(dim=0)
    values = {records.LOSS: 1.0, records.TEACHER_ENTROPY: -float((probs * probs.log()).sum()), records.KL: 0.0}
    bounds, before = Collapse(certain_steps=0), Verdict(has_moved=True, has_been_sharp=True)
    targets = {records.PROTOTYPES_NUMBER: 100.0, records.MUTUAL_INFORMATION: 0.05}
    assert before.after(1, values | targets, bounds=bounds).kind == "uniform"
    assert before.after(1, values, bounds=bounds).kind == "none"


# -------------------------------------------------------------------------------------------------- the teacher


def test_the_teacher_is_read_from_a_file_and_from_the_id_of_a_trial(tmp_path: Path) -> None:
    teacher = supervised(tmp_path)
    for name in (TRIAL, str(tmp_path / TRIAL / checkpoint.CHECKPOINT)):
        distillation = method(tmp_path, name=name)
        assert same(state(distillation.teacher), state(teacher.student))
        assert not same(state(distillation.student), state(teacher.student))


def test_the_students_start_is_that_of_a_supervised_trial_with_the_same_seed(tmp_path: Path) -> None:
    supervised(tmp_path)
    torch.manual_seed(0)
    alone = Supervised().build(BACKBONE.build(SIZE), SURROUNDINGS)
    assert same(state(method(tmp_path).student), state(alone.student))


def test_no_gradient_reaches_the_teacher(distillation: DistillationMethod) -> None:
    distillation.loss(batch(), now()).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in distillation.teacher.parameters())
    assert all(p.grad is not None for p in distillation.student.parameters())


def test_the_teacher_does_not_move_while_the_student_comes_nearer(distillation: DistillationMethod) -> None:
    before = state(distillation.teacher)
    optimizer = torch.optim.AdamW(distillation.student.parameters(), lr=5e-3)
    divergences = []
    for step in range(30):
        outcome = take_step(distillation, optimizer, step, batch())
        divergences.append(float(outcome.measures[records.KL]))
    assert same(state(distillation.teacher), before)
    assert divergences[-1] < 0.5 * divergences[0]


def test_the_teacher_has_no_drop_path_and_no_statistics_of_the_batch(tmp_path: Path) -> None:
    resnet = Backbone(name="resnet18", drop_path_rate=0.9)
    supervised(tmp_path, backbone=resnet)
    distillation = method(tmp_path, backbone=resnet)
    assert not any(module.training for module in distillation.teacher.modules())
    before = state(distillation.teacher)
    first = distillation.teacher([batch().global_crops[:, :1]])[0]
    torch.testing.assert_close(distillation.teacher([batch().global_crops])[0][:, :1], first)
    assert same(state(distillation.teacher), before)


def test_a_checkpoint_of_another_number_of_classes_says_so(tmp_path: Path) -> None:
    supervised(tmp_path, classes_number=9)
    with pytest.raises(
        ValueError, match=rf"method\.checkpoint = '{TRIAL}'.*head\.linear\.weight \[9, 24\] for \[5, 24\]"
    ):
        method(tmp_path)


@pytest.mark.parametrize(
    ("knobs", "difference"),
    [
        ({"embed_dim": 48}, r"has .*\[48\] for \[24\].* and \d+ more"),
        ({"depth": 1}, r"lacks backbone\.vit\.blocks\.1\."),
        ({"depth": 3}, r"has, besides what is expected, backbone\.vit\.blocks\.2\."),
    ],
)
def test_a_checkpoint_of_another_architecture_says_what_differs(
    tmp_path: Path, knobs: dict[str, int], difference: str
) -> None:
    supervised(tmp_path, backbone=BACKBONE.but(knobs))
    with pytest.raises(ValueError, match=difference):
        method(tmp_path)


def test_a_checkpoint_of_a_network_with_another_head_says_so(tmp_path: Path) -> None:
    student = Network(BACKBONE.build(SIZE), BottleneckHeadSettings(out_dim=8, hidden_dim=8, bottleneck_dim=4).build(24))
    file = tmp_path / "dino.pt"
    checkpoint.save(file, {"method": {f"student.{name}": value for name, value in student.state_dict().items()}})
    with pytest.raises(ValueError, match=r"lacks head\.linear\.bias.*has, besides what is expected, head\.last_layer"):
        method(tmp_path, name=str(file))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nowhere'"):
        method(tmp_path, name="nowhere")


def test_a_teacher_has_to_be_named() -> None:
    with pytest.raises(KnobError, match="checkpoint"):
        Distillation.of({})
    with pytest.raises(KnobError, match="checkpoint"):
        Distillation.of({"checkpoint": ""})


# -------------------------------------------------------------------------------------------------- invariants


def test_the_loss_changes_no_state(distillation: DistillationMethod) -> None:
    before = state(distillation)
    distillation.loss(batch(), now())
    distillation.after_step(now())
    assert same(state(distillation), before)


def test_measuring_changes_no_loss(distillation: DistillationMethod) -> None:
    unmeasured = distillation.loss(batch(), now(measured=False))
    assert unmeasured.measures == {}
    assert unmeasured.loss == distillation.loss(batch(), now()).loss


def test_a_state_that_is_loaded_brings_student_and_teacher(tmp_path: Path) -> None:
    supervised(tmp_path)
    trained, other = method(tmp_path), method(tmp_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.load_state_dict(state(trained))
    assert same(state(other), state(trained))
    assert trained.loss(batch(), now()).loss == other.loss(batch(), now()).loss


def test_its_own_checkpoint_is_read_as_the_students(distillation: DistillationMethod, tmp_path: Path) -> None:
    file = tmp_path / "own.pt"
    checkpoint.save(file, {"method": distillation.state_dict()})
    assert same(read_network(str(file), tmp_path), state(distillation.student))


def test_the_student_is_judged(distillation: DistillationMethod) -> None:
    crops = batch()
    assert distillation.encoders() == {"student": distillation.student.backbone}
    features = distillation.loss(crops, now()).features
    assert not features.requires_grad
    torch.testing.assert_close(features[1], distillation.student.backbone(crops.global_crops[1]).detach())
