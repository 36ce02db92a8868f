"""Supervised training against plain loops over crops, images and classes."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dino_lab.core.methods.method import Batch
from dino_lab.core.methods.supervised import Supervised, SupervisedMethod
from dino_lab.core.networks.backbone import Backbone

from .small import BACKBONE, CLASSES, SIZE, SURROUNDINGS, B, batch, now, same, softmax, state, take_step


def method(seed: int = 0, backbone: Backbone = BACKBONE, **knobs: float) -> SupervisedMethod:
    torch.manual_seed(seed)
    return Supervised(**knobs).build(backbone.build(SIZE), SURROUNDINGS)


def terms(supervised: SupervisedMethod, crops: Batch, smoothing: float) -> Iterator[float]:
    """-sum_k q_k log p_k of every crop of every image, with a loop for every index."""
    for view in [*crops.global_crops, *crops.local_crops]:
        for i in range(B):
            with torch.no_grad():
                feature = supervised.student.backbone(view[i : i + 1])
                logits = supervised.student.head(feature)[0].double().numpy()
            log_p = np.log(softmax(logits))
            for_true, for_any = 1 - smoothing, smoothing / CLASSES
            yield -sum((for_any + (for_true if k == crops.labels[i] else 0)) * log_p[k] for k in range(CLASSES))


@pytest.mark.parametrize("local_crops", [0, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_is_the_mean_over_all_crops_of_the_cross_entropy_with_the_smoothed_label(
    smoothing: float, local_crops: int
) -> None:
    supervised, crops = method(label_smoothing=smoothing), batch(local_crops=local_crops)
    with torch.no_grad():
        supervised.student.head.linear.weight.mul_(50)
    expected = list(terms(supervised, crops, smoothing))
    assert len(expected) == (2 + local_crops) * B
    assert supervised.loss(crops, now()).loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_classifier_that_knows_nothing_costs_ln_of_the_number_of_classes() -> None:
    supervised = method()
    torch.nn.init.zeros_(supervised.student.head.linear.weight)
    assert supervised.loss(batch(), now()).loss.item() == pytest.approx(math.log(CLASSES))


def test_the_labels_are_learned() -> None:
    supervised, crops = method(label_smoothing=0.0), batch()
    optimizer = torch.optim.AdamW(supervised.student.parameters(), lr=5e-3)
    losses = [take_step(supervised, optimizer, step, crops).loss.item() for step in range(30)]
    assert losses[-1] < 0.1 < losses[0]


def test_every_parameter_of_the_student_gets_a_gradient_and_none_is_held() -> None:
    supervised = method()
    supervised.loss(batch(), now()).loss.backward()
    assert all(parameter.grad is not None for parameter in supervised.student.parameters())
    assert not list(supervised.held(now()))


def test_the_state_is_backbone_and_head_of_the_student() -> None:
    names = set(method().state_dict())
    assert {"student.head.linear.weight", "student.head.linear.bias"} <= names
    assert all(name.startswith(("student.backbone.", "student.head.")) for name in names)


def test_a_state_that_is_loaded_gives_the_same_loss() -> None:
    trained, other = method(0), method(1)
    assert trained.loss(batch(), now()).loss != other.loss(batch(), now()).loss
    other.load_state_dict(state(trained))
    assert trained.loss(batch(), now()).loss == other.loss(batch(), now()).loss


def test_neither_the_loss_nor_what_follows_a_step_changes_state() -> None:
    supervised = method()
    before = state(supervised)
    supervised.loss(batch(), now())
    supervised.after_step(now())
    assert same(state(supervised), before)


def test_features_are_the_backbones_of_the_global_crops() -> None:
    supervised, crops = method(), batch()
    outcome = supervised.loss(crops, now())
    assert not outcome.features.requires_grad
    for g in range(2):
        torch.testing.assert_close(outcome.features[g], supervised.student.backbone(crops.global_crops[g]).detach())


def test_it_has_no_teacher_and_no_targets() -> None:
    supervised = method()
    outcome = supervised.loss(batch(), now())
    assert (outcome.targets, outcome.outputs, outcome.measures) == (None, None, {})
    assert supervised.encoders() == {"student": supervised.student.backbone}


def test_other_families_of_backbones_are_classified_too() -> None:
    supervised = method(backbone=Backbone(name="resnet18", drop_path_rate=0.0))
    assert torch.isfinite(supervised.loss(batch(local_crops=0), now()).loss)
