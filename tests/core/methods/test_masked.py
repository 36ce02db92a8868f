"""Masked prediction against plain loops, against lightly's iBOT loss, and its masks against BEiT's algorithm."""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import IBOTPatchLoss
from torch import Tensor

from dino_lab.core import checkpoint, records
from dino_lab.core.methods.masked import Masked, MaskedMethod
from dino_lab.core.methods.method import Batch, Outcome
from dino_lab.core.methods.patches import block_masks, places, random_masks
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.networks.head import BottleneckHeadSettings
from dino_lab.core.schedules import Now

from . import small
from .small import (
    FINE,
    SIDE,
    SIZE,
    SURROUNDINGS,
    N,
    cross_entropy_and_parts,
    moved,
    now,
    over,
    same,
    softmax,
    state,
)

B, K = 3, 16
batch = partial(small.batch, images=B)
SETTINGS = Masked(head=BottleneckHeadSettings(out_dim=K, hidden_dim=32, bottleneck_dim=16))


def method(seed: int = 0, **knobs: float | bool | str) -> MaskedMethod:
    """Teacher and student apart, logits as large as after some training."""
    torch.manual_seed(seed)
    changes = {name.replace("__", "."): value for name, value in knobs.items()}
    masked = SETTINGS.but(changes).build(FINE.build(SIZE), SURROUNDINGS)
    with torch.no_grad():
        masked.student.backbone.vit.pos_embed.normal_()
    return moved(masked)


def loss(masked: MaskedMethod, crops: Batch, moment: Now | None = None, *, seed: int = 5) -> Outcome:
    torch.manual_seed(seed)
    return masked.loss(crops, moment or now())


# ---------------------------------------------------------------------------------------------------- the loss


def tokens(vit: Any, crop: Tensor, *, hidden: Collection[int] = (), mask_token: Tensor | None = None) -> Tensor:
    """Patch tokens of one crop, by timm's own modules, with the mask token in place of the hidden patches."""
    patches = [mask_token if n in hidden else patch for n, patch in enumerate(vit.patch_embed(crop[None])[0])]
    x = torch.stack([vit.cls_token[0, 0], *patches]) + vit.pos_embed[0]
    return vit.norm(vit.blocks(x[None]))[0, 1:]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"mask_ratio": 0.5, "loss__teacher_temp": 0.07, "loss__student_temp": 0.2},
        {"mask_ratio": 0.4, "blocks": True, "operation__center_momentum": 0.3},
        {"loss__warmup_teacher_temp": 0.02, "loss__teacher_temp": 0.06, "loss__warmup_teacher_temp_epochs": 3},
    ],
    ids=["defaults", "hot", "blocks", "warm-up"],
)
def test_two_steps_are_those_of_plain_loops_over_masked_patches(knobs: dict[str, float]) -> None:
    masked = method(**knobs)
    ratio, blocks = float(knobs.get("mask_ratio", 0.15)), knobs.get("blocks", False)
    momentum = knobs.get("operation__center_momentum", 0.9)
    student_temp = knobs.get("loss__student_temp", 0.1)
    center = np.zeros(K)

    for step in (0, 2):  # the first steps of two epochs
        teacher_temp = knobs.get("loss__teacher_temp", 0.04)
        if "loss__warmup_teacher_temp" in knobs:
            teacher_temp = (0.02, 0.04, 0.06)[step // 2]
        crops = batch(step)
        outcome = loss(masked, crops, now(step), seed=step)

        torch.manual_seed(step)
        number = round(ratio * N)
        hidden = block_masks(2 * B, SIDE, number) if blocks else random_masks(2 * B, N, number)
        terms, logits_sum, targets = [], np.zeros(K), []
        with torch.no_grad():
            for i, crop in enumerate(crops.global_crops.flatten(0, 1)):
                chosen = {n for n in range(N) if hidden[i, n]}
                teacher_tokens = tokens(masked.teacher.network.backbone.vit, crop)
                student_tokens = tokens(
                    masked.student.backbone.vit, crop, hidden=chosen, mask_token=masked.student.mask_token[0]
                )
                torch.testing.assert_close(
                    outcome.features.flatten(0, 1)[i], teacher_tokens.mean(dim=0), atol=1e-4, rtol=1e-4
                )
                for n in range(N):
                    teacher_logits = masked.teacher.network.head(teacher_tokens[n]).double().numpy()
                    logits_sum += teacher_logits
                    if n not in chosen:
                        continue
                    q = softmax((teacher_logits - center) / teacher_temp)
                    p = softmax(masked.student.head(student_tokens[n]).double().numpy() / student_temp)
                    terms.append(cross_entropy_and_parts(q, p))
                    targets.append(q)
        losses, entropies, divergences = zip(*terms, strict=True)
        assert len(losses) == 2 * B * number
        assert outcome.loss.item() == pytest.approx(np.mean(losses), rel=1e-3)
        assert float(outcome.measures[records.TEACHER_ENTROPY]) == pytest.approx(np.mean(entropies), rel=1e-3, abs=1e-5)
        assert float(outcome.measures[records.KL]) == pytest.approx(np.mean(divergences), rel=1e-3)
        assert outcome.measures[records.TEACHER_TEMP] == pytest.approx(teacher_temp)
        assert float(outcome.measures[records.CENTER_NORM]) == pytest.approx(np.linalg.norm(center), abs=1e-5)
        assert outcome.targets.shape == (2, B, number, K)
        np.testing.assert_allclose(outcome.targets.flatten(0, 2), np.stack(targets), atol=1e-3)

        masked.after_step(now(step))
        center = momentum * center + (1 - momentum) * logits_sum / (2 * B * N)
        np.testing.assert_allclose(masked.center, center, atol=1e-5)


def test_the_loss_is_lightlys_of_ibot() -> None:
    masked, crops = method(mask_ratio=0.4), batch()
    masked.center.normal_(std=0.3)
    theirs = IBOTPatchLoss(K, teacher_temp=0.04, student_temp=0.1)
    theirs.center.center.copy_(masked.center[None])
    outcome = loss(masked, crops)

    torch.manual_seed(5)
    hidden = random_masks(2 * B, N, round(0.4 * N))
    flat = crops.global_crops.flatten(0, 1)
    student = masked.student
    with torch.no_grad():
        vit = masked.teacher.network.backbone
        teacher_out = masked.teacher.network.head(vit.encode(vit.tokens(flat))[:, 1:][hidden])
        seen = student.backbone.tokens(flat, hidden=hidden, mask_token=student.mask_token[0])
        student_out = student.head(student.backbone.encode(seen)[:, 1:][hidden])
        expected = theirs(teacher_out, student_out, hidden.view(-1, SIDE, SIDE))
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("teacher_temp", [0.01, 0.04, 1.0])
@pytest.mark.parametrize("blocks", [True, False])
def test_loss_is_teacher_entropy_plus_kl(teacher_temp: float, blocks: bool) -> None:
    masked = method(loss__teacher_temp=teacher_temp, loss__warmup_teacher_temp=teacher_temp, blocks=blocks)
    outcome = loss(masked, batch())
    parts = outcome.measures[records.TEACHER_ENTROPY] + outcome.measures[records.KL]
    assert float(parts) == pytest.approx(outcome.loss.item(), abs=1e-5)
    assert float(outcome.measures[records.KL]) > 0


# ------------------------------------------------------------------------------------------------- what is seen


def test_the_student_does_not_see_the_pixels_of_masked_patches_and_the_teacher_does() -> None:
    masked, crops = method(), batch().global_crops[0]
    torch.manual_seed(1)
    hidden = random_masks(B, N, 4)
    changed = torch.where(over(hidden), crops + 3, crops)
    before = masked.student.masked_logits(crops, hidden, places(hidden))
    assert torch.equal(masked.student.masked_logits(changed, hidden, places(hidden)), before)
    visible = torch.where(over(hidden), crops, crops + 3)
    assert not torch.allclose(masked.student.masked_logits(visible, hidden, places(hidden)), before)
    assert not torch.allclose(masked._teacher_patches(changed)[0], masked._teacher_patches(crops)[0])


def test_local_crops_are_not_used() -> None:
    masked = method()
    assert loss(masked, batch(local_crops=0)).loss == loss(masked, batch(local_crops=3)).loss


# -------------------------------------------------------------------------------------- teacher, centre and state


def test_the_teacher_starts_as_the_student_and_has_no_mask_token() -> None:
    torch.manual_seed(0)
    masked = SETTINGS.build(FINE.build(SIZE), SURROUNDINGS)
    student = state(masked.student)
    mask_token = student.pop("mask_token")
    assert same(state(masked.teacher.network), student)
    assert mask_token.std() > 0


def test_no_gradient_reaches_the_teacher() -> None:
    masked = method()
    outcome = loss(masked, batch())
    outcome.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in masked.teacher.parameters())
    assert all(p.grad is not None for p in masked.student.parameters() if p.requires_grad)
    assert masked.student.mask_token.grad.abs().sum() > 0
    assert not outcome.features.requires_grad
    assert not outcome.targets.requires_grad


def test_the_teacher_follows_the_student_after_a_step() -> None:
    masked = method(teacher__momentum_teacher=0.9)
    loss(masked, batch())
    name = "head.last_layer.weight_v"
    teacher, student = (state(network)[name] for network in (masked.teacher.network, masked.student))
    masked.after_step(now())
    torch.testing.assert_close(masked.teacher.network.state_dict()[name], 0.9 * teacher + 0.1 * student)


def test_the_loss_changes_no_state() -> None:
    masked = method()
    before = state(masked)
    loss(masked, batch())
    assert same(state(masked), before)


def test_the_loss_of_a_step_uses_the_centre_of_the_steps_before() -> None:
    masked = method(operation__center_momentum=0.0, teacher__momentum_teacher=1.0)
    first = loss(masked, batch())
    masked.after_step(now())
    assert masked.center.norm() > 0
    second = loss(masked, batch())
    assert not torch.allclose(second.targets, first.targets)


def test_the_centre_of_a_batch_in_parts_is_that_of_the_whole() -> None:
    whole, parts, crops = method(), method(), batch()
    loss(whole, crops)
    for part in crops.split(3):
        loss(parts, part)
    for masked in (whole, parts):
        masked.after_step(now())
    torch.testing.assert_close(parts.center, whole.center)
    assert whole.center.norm() > 0


def test_measuring_changes_neither_loss_nor_state() -> None:
    masked = method()
    measured, silent = (loss(masked, batch(), now(measured=measured)) for measured in (True, False))
    assert measured.loss == silent.loss
    assert silent.measures == {}
    assert records.MOMENTUM_TEACHER in measured.measures


def test_a_state_that_is_loaded_gives_the_same_loss_and_centre() -> None:
    trained, other = method(0), method(1)
    loss(trained, batch())
    trained.after_step(now())
    other.load_state_dict(state(trained))
    assert loss(trained, batch()).loss == loss(other, batch()).loss
    for masked in (trained, other):
        masked._logits_means.clear()
        loss(masked, batch(1))
        masked.after_step(now(1))
    assert same(state(trained), state(other))


def test_the_last_layer_is_held_for_its_epochs() -> None:
    masked = method(head__freeze_last_layer_epochs=1.0)
    assert set(masked.held(now(1))) == set(masked.student.head.last_layer.parameters())
    assert not list(masked.held(now(2)))


def test_masked_patches_are_learned() -> None:
    masked, crops = method(mask_ratio=0.4), batch()
    optimizer = torch.optim.AdamW(masked.student.parameters(), lr=3e-3)
    divergences = []
    for _ in range(40):
        outcome = loss(masked, crops)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        masked._logits_means.clear()  # teacher and centre stay, so that the student has them to reach
        divergences.append(float(outcome.measures[records.KL]))
    assert divergences[-1] < 0.2 * divergences[0]


def test_features_for_evaluation_are_the_mean_of_the_patch_tokens_of_whole_images() -> None:
    masked, images = method(), batch().global_crops[0]
    encoders = masked.encoders()
    assert list(encoders) == ["teacher", "student"]
    for role, backbone in (("teacher", masked.teacher.network.backbone), ("student", masked.student.backbone)):
        expected = backbone.vit.forward_features(images)[:, 1:].mean(dim=1)
        torch.testing.assert_close(encoders[role](images), expected, atol=1e-5, rtol=1e-4)


def test_a_teacher_that_was_given_is_not_evaluated(tmp_path: Path) -> None:
    given = method(1)
    checkpoint.save(tmp_path / "given.pt", {"method": given.state_dict()})
    masked = method(0, teacher__kind="frozen", teacher__checkpoint=str(tmp_path / "given.pt"))
    assert same(state(masked.teacher.network), state(given.teacher.network))
    assert list(masked.encoders()) == ["student"]


def test_batch_normalisation_in_the_head_takes_patches_for_its_batch() -> None:
    masked = method(head__batch_norm=True)
    outcome = loss(masked, batch())
    outcome.loss.backward()
    assert torch.isfinite(outcome.loss)


def test_a_backbone_without_patches_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name.*method\.kind = 'masked'"):
        SETTINGS.build(Backbone(name="resnet18").build(SIZE), SURROUNDINGS)


def test_a_crop_of_a_single_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"crops\.global_crops_size = {SIZE}"):
        SETTINGS.build(FINE.but({"patch_size": SIZE}).build(SIZE), SURROUNDINGS)
