"""DINO's switches: which go together, what they leave alone, and steps whose batch is worked through in parts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_lab.core import checkpoint, records
from dino_lab.core.methods.dino import DINO, DINOMethod
from dino_lab.core.settings import KnobError

from .plain import MLP_HEAD, PREDICTOR, SETTINGS, build, build_float64, close, reference_optimizer
from .small import batch, now, same, state, take_step

BATCH_NORM = {"head.batch_norm": True}
SWITCHES: dict[str, dict[str, Any]] = {
    "cross-entropy and centring": {},
    "arg-max": {"loss.teacher_temp": 0.0},
    "none": {"operation.kind": "none"},
    "softmax over the batch": {"operation.kind": "softmax_batch"},
    "sinkhorn": {"operation.kind": "sinkhorn"},
    "mse": {"loss.kind": "mse"},
    "cosine": {"loss.kind": "cosine"},
    "info_nce": {"loss.kind": "info_nce"},
    "student_copy": {"teacher.kind": "student_copy"},
    "previous_iteration": {"teacher.kind": "previous_iteration"},
    "previous_epoch": {"teacher.kind": "previous_epoch"},
    "predictor": PREDICTOR,
    "batch norm": BATCH_NORM,
    "mlp head": MLP_HEAD,
}
each_switch = pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())


# ------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_predictor_lets_the_student_see_the_image_from_the_start(activation: str) -> None:
    """Torch's own biases would be far larger than what the paper's head projects at its start."""
    changes = {"predictor.kind": "mlp", "predictor.batch_norm": False, "predictor.small_start": True}
    student = build(SETTINGS.but(changes | {"predictor.activation": activation})).student
    assert student.predictor is not None
    with torch.no_grad():
        projected = student.head.project(student.backbone(batch(0).global_crops[0]))
        spreads = [
            float(vectors.std(dim=0).norm() / vectors.mean(dim=0).norm())
            for vectors in (projected, student.predictor(projected))
        ]
    assert spreads[1] > spreads[0] / 2


# ------------------------------------------------------------------------------------- which switches go together


@pytest.mark.parametrize("loss", ["mse", "cosine", "info_nce"])
@pytest.mark.parametrize("operation", ["softmax_batch", "sinkhorn"])
def test_an_operation_that_makes_distributions_needs_a_loss_of_distributions(operation: str, loss: str) -> None:
    with pytest.raises(KnobError) as raised:
        DINO().but({"operation.kind": operation, "loss.kind": loss})
    assert f"method.operation.kind = '{operation}'" in str(raised.value)
    assert f"method.loss.kind = '{loss}'" in str(raised.value)


@pytest.mark.parametrize("operation", ["softmax_batch", "sinkhorn"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss.teacher_temp": 0.0}, "method.loss.teacher_temp = 0"),
        ({"loss.teacher_temp": 0.0, "loss.warmup_teacher_temp_epochs": 3}, "method.loss.teacher_temp = 0"),
        (
            {"loss.warmup_teacher_temp": 0.0, "loss.warmup_teacher_temp_epochs": 3},
            "method.loss.warmup_teacher_temp = 0",
        ),
    ],
)
def test_an_arg_max_cannot_be_evened_out(changes: dict[str, Any], named: str, operation: str) -> None:
    with pytest.raises(KnobError) as raised:
        DINO().but({"operation.kind": operation} | changes)
    assert named in str(raised.value)
    assert f"method.operation.kind = '{operation}'" in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"operation.kind": kind, "loss.kind": loss}
            for kind in ("centering", "none")
            for loss in ("mse", "info_nce")
        ),
        {"operation.kind": "none", "loss.teacher_temp": 0.0},
        # A warm-up of no epochs never comes to its first temperature.
        {"operation.kind": "sinkhorn", "loss.warmup_teacher_temp": 0.0},
        {"operation.kind": "softmax_batch", "loss.teacher_temp": 0.01},
    ],
)
def test_switches_that_go_together_are_taken(changes: dict[str, Any]) -> None:
    flat = DINO().but(changes).flat()
    assert {knob: flat[knob] for knob in changes} == changes


# --------------------------------------------------------------------------------------------------- the predictor


@pytest.mark.parametrize("head", [{}, MLP_HEAD], ids=["bottleneck", "mlp"])
def test_the_gradient_reaches_predictor_and_student_and_never_the_teacher(head: dict[str, Any]) -> None:
    method = build(SETTINGS.but(PREDICTOR | head))
    method.loss(batch(0), now()).loss.backward()
    for part in (method.student.predictor, method.student.head, method.student.backbone):
        gradients = [parameter.grad for parameter in part.parameters() if parameter.requires_grad]
        assert all(gradient is not None for gradient in gradients)
        assert torch.stack([gradient.norm() for gradient in gradients]).norm() > 0
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


def test_the_teacher_has_no_predictor() -> None:
    method = build(SETTINGS.but(PREDICTOR))
    assert method.teacher.network.predictor is None
    before = method.teacher([batch(0).global_crops])[0]
    with torch.no_grad():
        for parameter in method.student.predictor.parameters():
            parameter.add_(1)
    method.teacher.follow(method.student, now())
    assert torch.equal(method.teacher([batch(0).global_crops])[0], before)


# ------------------------------------------------------------------------------------------- batch normalisation


def test_batch_norm_uses_the_batch_of_student_and_of_teacher() -> None:
    method = build(SETTINGS.but(BATCH_NORM))
    crops = batch(0)
    outcome = method.loss(crops, now())
    running = [value for name, value in method.state_dict().items() if "running" in name]
    assert running
    with torch.no_grad():
        for value in running:
            value.fill_(7)
    again = method.loss(crops, now())
    assert torch.equal(again.loss, outcome.loss)
    assert torch.equal(again.targets, outcome.targets)


# ------------------------------------------------------------------------------------------------- what is state


@each_switch
def test_the_loss_changes_no_state(changes: dict[str, Any]) -> None:
    method = build(SETTINGS.but(changes))
    take_step(method, reference_optimizer(method.student), 0)  # so that no two weights are alike
    before = state(method)
    method.loss(batch(1), now(1))
    after = state(method)
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert bool(statistics) == (changes in (PREDICTOR, BATCH_NORM, MLP_HEAD))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - statistics)


@each_switch
def test_a_method_that_is_loaded_goes_on_to_the_same_bits(changes: dict[str, Any]) -> None:
    method = build(SETTINGS.but(changes))
    optimizer = reference_optimizer(method.student)
    for step in range(3):
        take_step(method, optimizer, step)
    again = build(SETTINGS.but(changes), seed=1)
    again.load_state_dict(state(method))
    optimizer_again = reference_optimizer(again.student)
    optimizer_again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (3, 4):
        outcomes = take_step(method, optimizer, step), take_step(again, optimizer_again, step)
        assert torch.equal(outcomes[0].loss, outcomes[1].loss)
    assert same(state(again), state(method))


def test_a_frozen_teacher_is_the_one_that_was_saved_and_stays(tmp_path: Path) -> None:
    trained = build(seed=1)
    take_step(trained, reference_optimizer(trained.student), 0)
    checkpoint.save(tmp_path / "trained.pt", {"method": trained.state_dict()})
    frozen = {"teacher.kind": "frozen", "teacher.checkpoint": str(tmp_path / "trained.pt")}
    method = build(SETTINGS.but(PREDICTOR | frozen))
    student = state(method.student)
    for step in range(3):
        take_step(method, reference_optimizer(method.student), step)
        assert same(state(method.teacher), state(trained.teacher))
    assert not same(state(method.student), student)


# -------------------------------------------------------------------------------------------- a batch in parts


def distance(ours: DINOMethod, theirs: DINOMethod) -> float:
    """Of two students' gradients, as a fraction of their length."""
    one, other = (
        torch.cat([parameter.grad.flatten() for parameter in method.student.parameters() if parameter.requires_grad])
        for method in (ours, theirs)
    )
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"operation.kind": "none"},
        {"loss.teacher_temp": 0.0},
        {"loss.kind": "mse"},
        {"loss.kind": "cosine"},
        {"teacher.kind": "previous_epoch"},
        PREDICTOR | {"predictor.batch_norm": False},
    ],
    ids=str,
)
def test_a_step_in_parts_is_that_of_the_whole_batch(changes: dict[str, Any], parts: int) -> None:
    whole, divided = (build_float64(SETTINGS.but(changes)) for _ in range(2))
    optimizers = [reference_optimizer(method.student) for method in (whole, divided)]
    for step in range(3):
        ours = take_step(divided, optimizers[1], step, parts=parts)
        theirs = take_step(whole, optimizers[0], step)
        close(ours.loss, theirs.loss, 1e-6)
        close(ours.features, theirs.features, 1e-6)
        for name, value in theirs.measures.items():
            close(ours.measures[name], value, 1e-6)
        assert distance(divided, whole) < 1e-6
        for name, value in whole.state_dict().items():
            close(divided.state_dict()[name], value, 1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"operation.kind": "sinkhorn"},
        {"operation.kind": "softmax_batch"},
        {"loss.kind": "info_nce"},
        BATCH_NORM,
        PREDICTOR,
    ],
    ids=str,
)
def test_a_step_in_parts_is_another_for_what_looks_at_the_whole_batch(changes: dict[str, Any]) -> None:
    """As the docstring of `Trial.accumulation_steps` says."""
    whole, divided = (build_float64(SETTINGS.but(changes)) for _ in range(2))
    for method, parts in ((whole, 1), (divided, 2)):
        take_step(method, reference_optimizer(method.student), 0, parts=parts)
    assert distance(divided, whole) > 1e-2


def test_the_centre_moves_once_toward_the_mean_of_all_parts() -> None:
    method = build(SETTINGS.but({"operation.center_momentum": 0.75}))
    parts = batch(0).split(4)
    with torch.no_grad():
        logits = torch.stack([method.teacher([part.global_crops])[0] for part in parts])
    for part in parts:
        method.loss(part, now())
        assert method.center.abs().max() == 0
    method.after_step(now())
    close(method.center, 0.25 * logits.mean(dim=(0, 1, 2)))


# --------------------------------------------------------------------------------------------- arg-max teachers


def test_an_arg_max_teacher_is_the_limit_of_cold_ones() -> None:
    outcomes = [
        build(SETTINGS.but({"loss.teacher_temp": temp})).loss(batch(0), now()) for temp in (0.0, 1e-5, 1e-3, 1e-1)
    ]
    limit = outcomes[0]
    assert torch.isfinite(limit.loss)
    assert limit.measures[records.TEACHER_ENTROPY] == 0
    close(limit.measures[records.KL], limit.loss)
    distances = [float((outcome.targets - limit.targets).abs().max()) for outcome in outcomes]
    assert distances == sorted(distances)
    close(outcomes[1].targets, limit.targets)
    close(outcomes[1].loss, limit.loss)
