"""DINO against a version written from the paper with plain loops, and against lightly's."""

import copy
import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.methods.dino import DINO, DINOMethod, cross_entropy, kl_divergence
from dino_lab.core.methods.method import Batch, Now
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.networks.head import Head
from dino_lab.core.networks.network import Network
from dino_lab.core.optimizers import AdamW, clip_each, set_schedule

B, K = 4, 32
BACKBONE = Backbone(name="vit_tiny_patch16_224", patch_size=8, embed_dim=24, depth=2, num_heads=3, drop_path_rate=0.0)
HEAD = Head(out_dim=K, hidden_dim=32, bottleneck_dim=16)


def network(seed: int = 0, backbone: Backbone = BACKBONE) -> Network:
    torch.manual_seed(seed)
    vit = backbone.build(16)
    return Network(vit, HEAD.build(vit.embed_dim))


def batch(seed: int, *, global_crops: int = 2, local_crops: int = 2, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(global_crops, B, 3, 16, 16, generator=generator, dtype=dtype),
        torch.randn(local_crops, B, 3, 8, 8, generator=generator, dtype=dtype),
    )


def now(epoch: int = 0, *, momentum_teacher: float = 0.9, measured: bool = True) -> Now:
    return Now(epoch=epoch, momentum_teacher=momentum_teacher, measured=measured)


# ------------------------------------------------------------------------------------ the paper, in plain loops


class PlainDINO:
    """Algorithm 1 and Section 3.1 with a loop for every index. Slow, and without a line of the lab's method."""

    def __init__(self, student: nn.Module, settings: DINO) -> None:
        self.student = student
        self.teacher = copy.deepcopy(student).eval()
        self.settings = settings
        self.center = torch.zeros(K, dtype=torch.float64)
        self.kl = self.entropy = 0.0

    @staticmethod
    def logits(model: nn.Module, crops: Tensor) -> Tensor:
        """Of one crop of every image, on its own."""
        return model.head(model.backbone(crops))  # type: ignore[operator, union-attr]

    def step(self, crops: Batch, *, teacher_temp: float, momentum_teacher: float, optimizer, clip: float) -> Tensor:
        student_temp = self.settings.student_temp
        student = [self.logits(self.student, view) for view in [*crops.global_crops, *crops.local_crops]]
        with torch.no_grad():
            teacher = [self.logits(self.teacher, view) for view in crops.global_crops]

        terms, divergences, entropies = [], [], []
        for t, teacher_view in enumerate(teacher):
            for s, student_view in enumerate(student):
                if s == t:
                    continue
                for i in range(B):
                    q = torch.softmax((teacher_view[i] - self.center) / teacher_temp, dim=0)
                    log_p = torch.log_softmax(student_view[i] / student_temp, dim=0)
                    terms.append(-sum(q[k] * log_p[k] for k in range(K)))
                    divergences.append(sum(float(q[k]) * (math.log(q[k]) - float(log_p[k].detach())) for k in range(K)))
                    entropies.append(-sum(float(q[k]) * math.log(q[k]) for k in range(K)))
        loss = sum(terms) / len(terms)
        self.kl, self.entropy = (sum(values) / len(values) for values in (divergences, entropies))

        optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None and clip and parameter.grad.norm() + 1e-6 > clip:
                parameter.grad *= clip / (parameter.grad.norm() + 1e-6)
        optimizer.step()

        with torch.no_grad():
            for theta_t, theta_s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                theta_t.copy_(momentum_teacher * theta_t + (1 - momentum_teacher) * theta_s)
            mean = sum(view[i] for view in teacher for i in range(B)) / (len(teacher) * B)
            m = self.settings.center_momentum
            if self.settings.centering:
                self.center = m * self.center + (1 - m) * mean
        return loss.detach()


def reference_optimizer(model: nn.Module) -> torch.optim.AdamW:
    decayed = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and not n.endswith("bias")]
    spared = [p for n, p in model.named_parameters() if p.requires_grad and (p.ndim == 1 or n.endswith("bias"))]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


def gradients(model: nn.Module) -> Iterator[Tensor]:
    return (p.grad for p in model.parameters() if p.grad is not None)


def close(ours: Tensor | float, theirs: Tensor | float) -> None:
    torch.testing.assert_close(torch.as_tensor(ours).double(), torch.as_tensor(theirs).double(), rtol=1e-5, atol=1e-5)


CASES = {
    "defaults": ({}, 0.996, 2, 2),
    "hot teacher": ({"teacher_temp": 0.07, "student_temp": 0.2}, 0.9, 2, 1),
    "warm-up": ({"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3}, 0.5, 2, 2),
    "quick centre": ({"center_momentum": 0.1}, 0.9, 2, 2),
    "held centre": ({"center_momentum": 1.0}, 0.9, 2, 1),
    "copied teacher": ({"center_momentum": 0.0}, 0.0, 2, 1),
    "held teacher": ({}, 1.0, 2, 1),
    "two crops": ({}, 0.9, 2, 0),
    "one local crop": ({}, 0.9, 2, 1),
    "three local crops": ({}, 0.9, 2, 3),
    "three global crops": ({}, 0.9, 3, 0),
    "three and one": ({}, 0.9, 3, 1),
    "no centring": ({"centering": False}, 0.9, 2, 1),
    "no sharpening": ({"sharpening": False}, 0.9, 2, 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_three_steps_are_those_of_the_paper(case: tuple[dict[str, float], float, int, int]) -> None:
    knobs, momentum_teacher, global_crops, local_crops = case
    settings = DINO().but(knobs)
    # The lab's losses are float32 by design; float64 networks keep everything before and after them exact.
    student = network().double()
    plain = PlainDINO(copy.deepcopy(student), settings)
    method = settings.build(student, out_dim=K)
    ours, theirs = AdamW().build(method.student), reference_optimizer(plain.student)
    clip = 0.05

    for epoch in range(3):
        crops = batch(epoch, global_crops=global_crops, local_crops=local_crops, dtype=torch.float64)
        moment = now(epoch, momentum_teacher=momentum_teacher)
        outcome = method.loss(crops, moment)
        set_schedule(ours, lr=1e-3, weight_decay=0.1)
        ours.zero_grad()
        outcome.loss.backward()
        clip_each(method.student.parameters(), clip_grad=clip)
        ours.step()
        method.after_step(moment)

        temp = knobs.get("student_temp", 0.1) if not settings.sharpening else settings.teacher_temp
        if settings.warmup_teacher_temp_epochs:
            temp = (0.04, 0.055, 0.07)[epoch]
        loss = plain.step(crops, teacher_temp=temp, momentum_teacher=momentum_teacher, optimizer=theirs, clip=clip)

        close(outcome.loss, loss)
        close(outcome.measures[records.KL], plain.kl)
        close(outcome.measures[records.TEACHER_ENTROPY], plain.entropy)
        assert outcome.measures[records.TEACHER_TEMP] == pytest.approx(temp)
        close(method.center, plain.center)
        for ours_grad, theirs_grad in zip(gradients(method.student), gradients(plain.student), strict=True):
            close(ours_grad, theirs_grad)
        for model, reference in ((method.student, plain.student), (method.teacher, plain.teacher)):
            for ours_value, theirs_value in zip(model.parameters(), reference.parameters(), strict=True):
                close(ours_value, theirs_value)


@pytest.mark.parametrize(
    ("knobs", "global_crops", "local_crops"),
    [
        ({}, 2, 0),
        ({"teacher_temp": 0.07, "student_temp": 0.2}, 2, 3),
        ({"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 4}, 2, 1),
        ({"center_momentum": 0.3}, 3, 2),
    ],
)
def test_loss_and_centre_are_lightlys(knobs: dict[str, float], global_crops: int, local_crops: int) -> None:
    settings = DINO().but(knobs)
    method = settings.build(network(), out_dim=K)
    lightly = DINOLoss(
        K,
        warmup_teacher_temp=settings.warmup_teacher_temp,
        teacher_temp=settings.teacher_temp,
        warmup_teacher_temp_epochs=settings.warmup_teacher_temp_epochs,
        student_temp=settings.student_temp,
        center_momentum=settings.center_momentum,
    )
    for epoch in range(5):
        crops = batch(epoch, global_crops=global_crops, local_crops=local_crops)
        with torch.no_grad():
            teacher_out, _ = method.teacher([crops.global_crops])
            student_out, _ = method.student([crops.global_crops, crops.local_crops])
            theirs = lightly(list(teacher_out), list(student_out), epoch=epoch)
        ours = method.loss(crops, now(epoch))
        method.after_step(now(epoch))
        close(ours.loss, theirs)
        close(method.center, lightly.center.flatten())
        with torch.no_grad():  # else teacher and student stay the same
            for parameter in method.student.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(epoch)))


# ----------------------------------------------------------------------------------------------- closed forms


def log_probs(views: int, seed: int = 0) -> Tensor:
    return torch.randn(views, B, K, generator=torch.Generator().manual_seed(seed)).log_softmax(dim=-1)


def test_uniform_targets_and_student_cost_ln_k() -> None:
    uniform = torch.full((2, B, K), 1 / K)
    close(cross_entropy(uniform, torch.full((5, B, K), -math.log(K))), math.log(K))
    close(kl_divergence(uniform.log(), torch.full((5, B, K), -math.log(K))), 0.0)


def test_uniform_targets_cost_the_mean_negative_log_probability() -> None:
    probs = log_probs(2)
    close(cross_entropy(torch.full((2, B, K), 1 / K), probs), -probs.mean())


def test_one_hot_targets_cost_the_negative_log_probability_of_their_prototype() -> None:
    probs = log_probs(3)
    targets = F.one_hot(torch.tensor([[1] * B, [2] * B]), K).float()
    # Target 0 meets crops 1 and 2, target 1 meets crops 0 and 2.
    pairs = torch.stack([probs[1, :, 1], probs[2, :, 1], probs[0, :, 2], probs[2, :, 2]])
    close(cross_entropy(targets, probs), -pairs.mean())


def test_one_hot_targets_that_the_student_meets_cost_nothing() -> None:
    targets = F.one_hot(torch.zeros(2, B, dtype=torch.long), K).float()
    close(cross_entropy(targets, (targets * 100).log_softmax(dim=-1)), 0.0)


def test_a_crop_is_not_compared_with_itself() -> None:
    targets, probs = log_probs(2, seed=1).exp(), log_probs(2).requires_grad_()
    cross_entropy(targets, probs).backward()
    close(probs.grad, -targets.flip(0) / (2 * B))


@pytest.mark.parametrize(("global_crops", "local_crops"), [(2, 0), (2, 3), (3, 1)])
@pytest.mark.parametrize("teacher_temp", [0.01, 0.04, 1.0])
def test_loss_is_teacher_entropy_plus_kl(global_crops: int, local_crops: int, teacher_temp: float) -> None:
    method = DINO(teacher_temp=teacher_temp).build(network(), out_dim=K)
    with torch.no_grad():
        method.student.head.last_layer.weight_v.normal_(generator=torch.Generator().manual_seed(3))
    outcome = method.loss(batch(0, global_crops=global_crops, local_crops=local_crops), now())
    parts = outcome.measures[records.TEACHER_ENTROPY] + outcome.measures[records.KL]
    assert float(parts) == pytest.approx(outcome.loss.item(), abs=1e-5)
    assert float(outcome.measures[records.KL]) > 0


# ------------------------------------------------------------------------------------------------- invariants


def state(method: DINOMethod) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_teacher_equals_student_at_the_start() -> None:
    method = DINO().build(network(), out_dim=K)
    assert same(dict(method.teacher.state_dict()), dict(method.student.state_dict()))
    assert not {p.data_ptr() for p in method.teacher.parameters()} & {p.data_ptr() for p in method.student.parameters()}


def test_teacher_receives_no_gradient() -> None:
    method = DINO().build(network(), out_dim=K)
    method.loss(batch(0), now()).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
    assert method.center.grad is None


def test_teacher_sees_global_crops_only_and_the_student_all() -> None:
    method = DINO().build(network(), out_dim=K)
    seen: dict[str, list[tuple[int, ...]]] = {"teacher": [], "student": []}
    for name in seen:
        getattr(method, name).backbone.register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(tuple(inputs[0].shape))
        )
    method.loss(batch(0, global_crops=2, local_crops=3), now())
    assert seen == {"teacher": [(2 * B, 3, 16, 16)], "student": [(2 * B, 3, 16, 16), (3 * B, 3, 8, 8)]}


def test_targets_do_not_depend_on_local_crops() -> None:
    method = DINO().build(network(), out_dim=K)
    crops = batch(0)
    targets = method.loss(crops, now()).targets
    assert torch.equal(method.loss(crops._replace(local_crops=crops.local_crops + 1), now()).targets, targets)


def test_the_loss_changes_no_state() -> None:
    method = DINO().build(network(), out_dim=K)
    before = state(method)
    method.loss(batch(0), now())
    assert same(state(method), before)


def test_the_loss_of_a_step_uses_the_centre_of_the_steps_before() -> None:
    method = DINO(center_momentum=0.0).build(network(), out_dim=K)
    first, second = (method.loss(batch(seed), now()) for seed in (0, 1))
    assert method.center.abs().max() == 0
    method.loss(batch(0), now())
    method.after_step(now(momentum_teacher=1.0))
    logits, _ = method.teacher([batch(0).global_crops])
    close(method.center, logits.mean(dim=(0, 1)))
    assert not torch.allclose(method.loss(batch(0), now()).targets, first.targets)
    assert not torch.allclose(method.loss(batch(1), now()).targets, second.targets)


def test_measuring_changes_neither_loss_nor_state() -> None:
    ends, losses = [], []
    for measured in (True, False):
        method = DINO().build(network(), out_dim=K)
        optimizer = reference_optimizer(method.student)
        for step in range(3):
            moment = now(measured=measured)
            outcome = method.loss(batch(step), moment)
            losses.append(outcome.loss.item())
            optimizer.zero_grad()
            outcome.loss.backward()
            optimizer.step()
            method.after_step(moment)
            assert bool(outcome.measures) == measured
        ends.append(state(method))
    assert same(*ends)
    assert losses[:3] == losses[3:]


def test_without_centring_the_centre_stays_at_zero() -> None:
    method = DINO(centering=False).build(network(), out_dim=K)
    for step in range(3):
        method.loss(batch(step), now())
        method.after_step(now())
    assert method.center.abs().max() == 0


def test_without_sharpening_the_teacher_has_the_students_temperature() -> None:
    method = DINO(sharpening=False, student_temp=0.3, warmup_teacher_temp_epochs=4).build(network(), out_dim=K)
    outcome = method.loss(batch(0), now())
    logits, _ = method.teacher([batch(0).global_crops])
    close(outcome.targets, (logits / 0.3).softmax(dim=-1))
    assert [method.settings.teacher_temp_at(epoch) for epoch in (0, 1, 9)] == [0.3] * 3


def test_a_lower_teacher_temperature_sharpens_targets() -> None:
    temps = [0.02, 0.04, 0.1, 1.0]
    methods = [DINO(teacher_temp=temp).build(network(), out_dim=K) for temp in temps]
    entropies = [float(method.loss(batch(0), now()).measures[records.TEACHER_ENTROPY]) for method in methods]
    assert all(sharp < flat for sharp, flat in pairwise(entropies))


def test_teacher_has_no_drop_path_and_the_student_has() -> None:
    method = DINO().build(network(backbone=BACKBONE.but({"drop_path_rate": 0.9})), out_dim=K)
    crops = [batch(0).global_crops]
    for model, alike in ((method.teacher, True), (method.student, False)):
        first, second = model(crops)[0], model(crops)[0]
        assert torch.equal(first, second) == alike
    assert not method.teacher.training
    assert method.student.training
