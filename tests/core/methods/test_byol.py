"""BYOL against plain loops in numpy and against a training loop with lightly's loss."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.diagnostics import signals
from dino_lab.core.methods.byol import BYOL, BYOLMethod
from dino_lab.core.methods.method import Batch, Surroundings
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import Momentum
from dino_lab.core.schedules import Now

B, K, STEPS = 4, 16, 6
BACKBONE = Backbone(name="vit_tiny_patch16_224", patch_size=8, embed_dim=24, depth=2, num_heads=3, drop_path_rate=0.0)
SETTINGS = BYOL().but({"head.out_dim": K, "head.hidden_dim": 32, "predictor.hidden_dim": 32})
ALONE = SETTINGS.but({"predictor.kind": "none"})


def method(settings: BYOL = SETTINGS, backbone: Backbone = BACKBONE) -> BYOLMethod:
    torch.manual_seed(0)
    return settings.build(backbone.build(16), Surroundings(3, image_size=16, trials_dir=Path()))


def batch(seed: int, *, global_crops: int = 2, local_crops: int = 2, images: int = B) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(global_crops, images, 3, 16, 16, generator=generator),
        torch.randn(local_crops, images, 3, 8, 8, generator=generator),
        torch.zeros(images, dtype=torch.long),
    )


def now(step: int = 0, *, measured: bool = True) -> Now:
    return Now(step, steps=STEPS, steps_per_epoch=2, measured=measured)


def moved(byol: BYOLMethod) -> BYOLMethod:
    """The student away from its teacher, as after some steps."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in byol.student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return byol


def state(byol: nn.Module) -> dict[str, Tensor]:
    """All but the running statistics of batch normalisation, which any forward pass in training moves."""
    running = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.clone() for name, value in byol.state_dict().items() if not name.endswith(running)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- the paper's loss


def plain_outputs(network: Network, groups: list[Tensor]) -> np.ndarray:
    """Head and predictor written out: linear, batch normalisation over all crops, ReLU, linear. [V B K]"""
    with torch.no_grad():
        features = [network.backbone(crop) for crops in groups for crop in crops]
    x = torch.cat(features).double().numpy()
    for layers in (network.head.mlp, network.predictor):
        if layers is not None:
            first, norm, _, last = layers
            x = x @ first.weight.detach().double().numpy().T + first.bias.detach().double().numpy()
            x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + norm.eps)
            x = np.maximum(x * norm.weight.detach().numpy() + norm.bias.detach().numpy(), 0)
            x = x @ last.weight.detach().double().numpy().T + last.bias.detach().double().numpy()
    return x.reshape(len(features), -1, x.shape[-1])


@pytest.mark.parametrize("settings", [SETTINGS, ALONE], ids=["predictor", "no predictor"])
@pytest.mark.parametrize(("global_crops", "local_crops"), [(2, 0), (2, 3), (3, 1)])
def test_loss_and_outputs_are_those_of_plain_loops(settings: BYOL, global_crops: int, local_crops: int) -> None:
    byol = moved(method(settings))
    crops = batch(0, global_crops=global_crops, local_crops=local_crops)
    teacher = plain_outputs(byol.teacher.network, [crops.global_crops])
    student = plain_outputs(byol.student, [crops.global_crops, crops.local_crops])
    distances = []
    for g in range(global_crops):
        for v in range(global_crops + local_crops):
            if v == g:
                continue
            for i in range(B):
                z = teacher[g, i] / math.sqrt(sum(value**2 for value in teacher[g, i]))
                q = student[v, i] / math.sqrt(sum(value**2 for value in student[v, i]))
                distances.append(sum((q[k] - z[k]) ** 2 for k in range(K)))
    outcome = byol.loss(crops, now())
    assert outcome.loss.item() == pytest.approx(np.mean(distances), abs=1e-5)
    unit = teacher / np.linalg.norm(teacher, axis=-1, keepdims=True)
    np.testing.assert_allclose(outcome.outputs.numpy(), unit, atol=1e-5)


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
        outcome = byol.loss(crops, now(step))
        ours.zero_grad()
        outcome.loss.backward()
        ours.step()
        byol.after_step(now(step))

        with torch.no_grad():
            targets, _ = teacher([crops.global_crops])
        predictions, _ = student([crops.global_crops, crops.local_crops])
        # |a - b|^2 = 2 - 2 cos(a, b)
        pairs = [
            2 + 2 * similarity(prediction, target)
            for g, target in enumerate(targets)
            for v, prediction in enumerate(predictions)
            if g != v
        ]
        loss = sum(pairs) / len(pairs)
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
            outcome = byol.loss(batch(step, images=8, local_crops=0), now())
            optimizer.zero_grad()
            outcome.loss.backward()
            optimizer.step()
            byol.after_step(now())
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
    seen: dict[str, list[tuple[int, ...]]] = {"teacher": [], "student": []}
    for name, encoder in byol.encoders().items():
        encoder.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(tuple(inputs[0].shape)))
    byol.loss(batch(0, local_crops=3), now())
    assert seen == {"teacher": [(2 * B, 3, 16, 16)], "student": [(2 * B, 3, 16, 16), (3 * B, 3, 8, 8)]}


def test_features_are_those_of_the_teacher() -> None:
    byol = moved(method())
    crops = batch(0)
    features = torch.stack([byol.teacher.network.backbone(crop) for crop in crops.global_crops])
    torch.testing.assert_close(byol.loss(crops, now()).features, features)


def test_the_loss_changes_no_state() -> None:
    byol = method()
    before = state(byol)
    first, second = (byol.loss(batch(0), now()).loss for _ in range(2))
    assert same(state(byol), before)
    assert torch.equal(first, second)


def test_parts_of_a_batch_cost_together_what_the_batch_costs() -> None:
    byol = moved(method(SETTINGS.but({"head.batch_norm": False, "predictor.batch_norm": False})))
    crops = batch(0)
    parts = [byol.loss(part, now()) for part in crops.split(2)]
    whole = byol.loss(crops, now())
    torch.testing.assert_close(sum(part.loss for part in parts) / 2, whole.loss)
    torch.testing.assert_close(torch.cat([part.outputs for part in parts], dim=1), whole.outputs)


def trained(byol: BYOLMethod, optimizer: torch.optim.Optimizer, steps: range, *, measured: bool = True) -> None:
    for step in steps:
        torch.manual_seed(step)  # of drop path, as the trainer does
        optimizer.zero_grad()
        byol.loss(batch(step), now(step, measured=measured)).loss.backward()
        optimizer.step()
        byol.after_step(now(step))


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
        byol = method()
        trained(byol, torch.optim.AdamW(byol.student.parameters()), range(3), measured=measured)
        ends.append(dict(byol.state_dict()))
    assert same(*ends)
    assert method().loss(batch(0), now(measured=False)).measures == {}


def test_in_bf16_the_loss_is_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outcome = method().loss(batch(0), now())
    assert outcome.loss.dtype == outcome.features.dtype == outcome.outputs.dtype == torch.float32
    torch.testing.assert_close(outcome.outputs.norm(dim=-1), torch.ones(2, B))
