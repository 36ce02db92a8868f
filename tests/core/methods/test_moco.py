"""MoCo-v2 against plain loops in numpy and against a training loop with lightly's loss and memory bank."""

import copy
import math
from collections import deque
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.methods.moco import MoCo, MoCoMethod, info_nce
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.networks.teacher import Momentum

from .small import (
    BACKBONE,
    SIZE,
    STEPS,
    SURROUNDINGS,
    B,
    batch,
    moved,
    now,
    pairs,
    same,
    shapes_seen,
    state,
    take_step,
    take_steps,
    unit,
)

K, N = 16, 24
SETTINGS = MoCo().but({"head.out_dim": K, "head.hidden_dim": 32, "queue_size": N})


def method(settings: MoCo = SETTINGS, backbone: Backbone = BACKBONE) -> MoCoMethod:
    torch.manual_seed(0)
    return settings.build(backbone.build(SIZE), SURROUNDINGS)


# ---------------------------------------------------------------------------------------------- the paper's loss


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("knobs", "global_crops", "local_crops"),
    [
        ({}, 2, 0),
        ({"temp": 0.07}, 2, 3),
        ({"queue_size": 7}, 3, 1),
        ({"queue_size": 1, "temp": 1.0}, 3, 0),
        ({"head.batch_norm": True}, 2, 2),
    ],
)
def test_loss_is_that_of_plain_loops(
    knobs: dict[str, float], global_crops: int, local_crops: int, precision: str
) -> None:
    settings = SETTINGS.but(knobs)
    moco, crops = moved(method(settings)), batch(0, global_crops=global_crops, local_crops=local_crops)
    # In bf16 the networks are what they are, and the loss of their outputs is exact all the same.
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
        outcome = moco.loss(crops, now())
        with torch.no_grad():
            teacher, _ = moco.teacher([crops.global_crops])
            student, _ = moco.student([crops.global_crops, crops.local_crops])
    teacher, student, queue = (each.double().numpy() for each in (teacher, student, moco.queue))
    losses = []
    for g, v, i in pairs(global_crops, global_crops + local_crops):
        key, query = unit(teacher[g, i]), unit(student[v, i])
        positive = math.exp(sum(query[k] * key[k] for k in range(K)) / settings.temp)
        negatives = sum(math.exp(sum(query[k] * row[k] for k in range(K)) / settings.temp) for row in queue)
        losses.append(-math.log(positive / (positive + negatives)))
    assert outcome.loss.item() == pytest.approx(np.mean(losses), abs=1e-5)
    assert outcome.loss.dtype == outcome.features.dtype == outcome.outputs.dtype == torch.float32
    np.testing.assert_allclose(outcome.outputs.numpy(), unit(teacher), atol=1e-5)


@pytest.mark.parametrize("temp", [0.07, 0.2])
@pytest.mark.parametrize(("global_crops", "local_crops"), [(2, 0), (2, 2), (3, 1)])
def test_steps_and_queue_are_those_of_a_loop_with_lightlys(global_crops: int, local_crops: int, temp: float) -> None:
    moco = moved(method(SETTINGS.but({"temp": temp, "queue_size": 2 * global_crops * B})))
    student, teacher = copy.deepcopy(moco.student), copy.deepcopy(moco.teacher.network)
    lightly = NTXentLoss(temperature=temp, memory_bank_size=tuple(moco.queue.shape))
    lightly.memory_bank.bank.copy_(moco.queue)
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (moco.student, student))

    for step in range(5):
        crops = batch(step, global_crops=global_crops, local_crops=local_crops)
        outcome = take_step(moco, ours, step, crops)

        with torch.no_grad():
            keys, _ = teacher([crops.global_crops])
        queries, _ = student([crops.global_crops, crops.local_crops])
        bank, pointer = lightly.memory_bank.bank.clone(), lightly.memory_bank.bank_ptr.clone()
        losses = []
        for g, key in enumerate(keys):
            for v, query in enumerate(queries):
                if g != v:
                    losses.append(lightly(query, key))
                    # lightly's bank takes in the keys of every pair at once; here they wait for the step's end.
                    lightly.memory_bank.bank.copy_(bank)
                    lightly.memory_bank.bank_ptr.copy_(pointer)
        loss = sum(losses) / len(losses)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        with torch.no_grad():
            for key_parameter, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                key_parameter.mul_(0.999).add_(parameter, alpha=0.001)
        lightly.memory_bank(nn.functional.normalize(keys, dim=-1).flatten(0, 1), update=True)

        torch.testing.assert_close(outcome.loss, loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moco.queue, lightly.memory_bank.bank, rtol=1e-4, atol=1e-5)
        assert int(moco.pointer) == int(lightly.memory_bank.bank_ptr)
        for model, reference in ((moco.student, student), (moco.teacher.network, teacher)):
            for name, parameter in reference.named_parameters():
                torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_keys_that_are_all_alike_cost_ln_of_their_number(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    key = nn.functional.normalize(torch.randn(K, generator=generator), dim=0)
    queries = nn.functional.normalize(torch.randn(3, B, K, generator=generator), dim=-1)
    loss = info_nce(key.expand(2, B, K), queries, key.expand(rows, K), temp=0.2)
    assert loss.item() == pytest.approx(math.log(1 + rows), abs=1e-5)


def test_a_query_at_its_key_and_opposite_to_the_queue_costs_almost_nothing() -> None:
    key = nn.functional.normalize(torch.ones(K), dim=0)
    loss = info_nce(key.expand(2, B, K), key.expand(2, B, K), -key.expand(N, K), temp=0.2)
    assert loss.item() == pytest.approx(math.log1p(N * math.exp(-2 / 0.2)), abs=1e-6)


def test_a_crop_is_not_compared_with_its_own_key() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries, queue = (
        nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)
        for shape in ((2, B, K), (2, B, K), (N, K))
    )
    first, second = (info_nce(keys[[g]], queries[[g, 1 - g]], queue, temp=0.2) for g in range(2))
    torch.testing.assert_close(info_nce(keys, queries, queue, temp=0.2), (first + second) / 2)


# ----------------------------------------------------------------------------------------------------- the queue


def oldest_first(moco: MoCoMethod) -> Tensor:
    return moco.queue.roll(-int(moco.pointer), dims=0)


def test_the_queue_starts_with_random_directions() -> None:
    queue = method(SETTINGS.but({"queue_size": 2000})).queue
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(2000))
    # The mean product of two of so many random directions is 0, and its mean square 1 / K.
    products = (queue @ queue.T)[~torch.eye(2000, dtype=torch.bool)]
    assert abs(products.mean()) < 0.01
    assert products.square().mean() == pytest.approx(1 / K, rel=0.05)


@pytest.mark.parametrize("queue_size", [24, 16, 11, 8, 7, 3, 1])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_queue_is_first_in_first_out(queue_size: int, parts: int) -> None:
    moco = method(SETTINGS.but({"queue_size": queue_size}))
    expected = deque(moco.queue.clone(), maxlen=queue_size)
    for step in range(STEPS):
        outcomes = [moco.loss(part, now(step)) for part in batch(step).split(parts)]
        keys = torch.cat([outcome.outputs for outcome in outcomes], dim=1)
        for crop in keys:
            expected.extend(crop)
        moco.after_step(now(step))
        assert torch.equal(oldest_first(moco), torch.stack(list(expected)))


def test_the_queue_is_the_same_for_any_number_of_parts() -> None:
    queues = []
    for parts in (1, 2, 4):
        moco = method(SETTINGS.but({"queue_size": 19}))
        for step in range(3):
            for part in batch(step).split(parts):
                moco.loss(part, now(step))
            moco.after_step(now(step))
        queues.append(oldest_first(moco))
    torch.testing.assert_close(queues[0], queues[1])
    torch.testing.assert_close(queues[0], queues[2])


def test_the_loss_of_a_step_uses_the_queue_of_the_steps_before() -> None:
    moco = method()
    start = moco.queue.clone()
    first = moco.loss(batch(0), now())
    second = moco.loss(batch(0), now())
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(moco.queue, start)
    moco.after_step(now())
    assert not torch.equal(moco.queue, start)
    assert moco.loss(batch(0), now()).loss > first.loss  # it meets the keys of the very same images


def test_queue_and_pointer_are_saved_and_not_trained() -> None:
    moco = method()
    assert {"queue", "pointer"} <= moco.state_dict().keys()
    assert not {"queue", "pointer"} & {name for name, _ in moco.named_parameters()}


# ---------------------------------------------------------------------------------------------------- invariants


def test_published_settings_are_the_defaults() -> None:
    settings = MoCo()
    assert (settings.head.hidden_dim, settings.head.out_dim, settings.head.batch_norm) == (2048, 128, False)
    assert (settings.temp, settings.queue_size) == (0.2, 65536)
    assert settings.teacher == Momentum(momentum_teacher=0.999, momentum_teacher_end=0.999)


def test_the_teachers_momentum_is_constant() -> None:
    moco = method()
    momenta = [moco.loss(batch(0), now(step)).measures[records.MOMENTUM_TEACHER] for step in range(STEPS)]
    assert momenta == pytest.approx([0.999] * STEPS)


def test_teacher_starts_as_the_student() -> None:
    moco = method()
    assert same(state(moco.teacher.network), state(moco.student))
    assert not {p.data_ptr() for p in moco.teacher.parameters()} & {p.data_ptr() for p in moco.student.parameters()}


def test_gradient_reaches_the_student_and_never_the_teacher() -> None:
    moco = method()
    outcome = moco.loss(batch(0), now())
    outcome.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in moco.teacher.parameters())
    assert all(p.grad is not None for p in moco.student.parameters())
    assert not outcome.features.requires_grad
    assert not outcome.outputs.requires_grad
    assert not moco.queue.requires_grad


def test_teacher_sees_global_crops_only_and_the_student_all() -> None:
    moco = method()
    seen = shapes_seen(moco)
    moco.loss(batch(0, local_crops=3), now())
    assert seen == {"teacher": [(2 * B, 3, 16, 16)], "student": [(2 * B, 3, 16, 16), (3 * B, 3, 8, 8)]}


def test_features_are_those_of_the_teacher() -> None:
    moco = moved(method())
    crops = batch(0)
    features = torch.stack([moco.teacher.network.backbone(crop) for crop in crops.global_crops])
    torch.testing.assert_close(moco.loss(crops, now()).features, features)


def test_the_loss_changes_no_state() -> None:
    moco = method()
    before = state(moco)
    moco.loss(batch(0), now())
    assert same(state(moco), before)


def test_parts_of_a_batch_cost_together_what_the_batch_costs() -> None:
    moco, crops = moved(method()), batch(0)
    parts = [moco.loss(part, now()).loss for part in crops.split(2)]
    torch.testing.assert_close(sum(parts) / 2, moco.loss(crops, now()).loss)


@pytest.mark.parametrize("queue_size", [11, 3])
def test_resumed_from_its_state_it_ends_at_the_same_bits(queue_size: int) -> None:
    settings, dropped = SETTINGS.but({"queue_size": queue_size}), BACKBONE.but({"drop_path_rate": 0.5})
    whole, half, resumed = (method(settings, dropped) for _ in range(3))
    take_steps(whole, torch.optim.AdamW(whole.student.parameters()), range(6), parts=2)
    first, second = (torch.optim.AdamW(each.student.parameters()) for each in (half, resumed))
    take_steps(half, first, range(3), parts=2)
    resumed.load_state_dict(state(half))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(resumed, second, range(3, 6), parts=2)
    assert same(state(resumed), state(whole))


def test_measuring_changes_no_state() -> None:
    ends = []
    for measured in (True, False):
        moco = method()
        take_steps(moco, torch.optim.AdamW(moco.student.parameters()), range(3), parts=2, measured=measured)
        ends.append(state(moco))
    assert same(*ends)
    assert method().loss(batch(0), now(measured=False)).measures == {}
