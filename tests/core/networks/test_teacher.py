"""Every kind of teacher beside the weights that it should have, step by step, while the student changes."""

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_lab.core import checkpoint, records
from dino_lab.core.methods.dino import DINO
from dino_lab.core.methods.method import Surroundings
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.networks.head import BottleneckHeadSettings, MLPPredictor
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import (
    Frozen,
    Momentum,
    PreviousEpoch,
    PreviousIteration,
    StudentCopy,
    Teacher,
    TeacherSettings,
    move,
)
from dino_lab.core.schedules import Now
from dino_lab.core.settings import KnobError

STEPS, STEPS_PER_EPOCH = 7, 3
VIT = Backbone(name="vit_tiny_patch16_224", patch_size=8, embed_dim=12, depth=2, num_heads=3, drop_path_rate=0.5)
HEAD = BottleneckHeadSettings(out_dim=10, hidden_dim=8, bottleneck_dim=6, batch_norm=True)
PREDICTOR = MLPPredictor(hidden_dim=8)
FILE = "trained.pt"


def network(seed: int = 0, backbone: Backbone = VIT) -> Network:
    """A student with all that a teacher must not have: drop path and a predictor; and with batch normalisation."""
    torch.manual_seed(seed)
    built = backbone.build(16)
    return Network(built, HEAD.build(built.embed_dim), PREDICTOR.build(6))


def now(step: int) -> Now:
    return Now(step, steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH, measured=True)


def train(student: Network, step: int) -> None:
    """Changes every parameter by an amount of its own, the same for the same step; and the buffers."""
    generator = torch.Generator().manual_seed(100 + step)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        for buffer in student.buffers():
            buffer.add_(1)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters of backbone and head."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not name.startswith("predictor.")
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def images(seed: int = 0) -> list[Tensor]:
    return [torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))]


def written(path: Path, method: dict[str, Tensor]) -> Path:
    path.parent.mkdir(exist_ok=True)
    checkpoint.save(path, {"step": 9, "method": method})
    return path


def as_student(trained: Network) -> dict[str, Tensor]:
    return {f"student.{name}": value for name, value in trained.state_dict().items()}


@pytest.fixture
def trials_dir(tmp_path: Path) -> Path:
    """Where a trial "other" has finished, whose network is that of seed 9."""
    written(tmp_path / "other" / checkpoint.CHECKPOINT, as_student(network(9)))
    return tmp_path


KINDS: dict[str, TeacherSettings] = {
    "momentum": Momentum(momentum_teacher=0.7),
    "student_copy": StudentCopy(),
    "previous_iteration": PreviousIteration(),
    "previous_epoch": PreviousEpoch(),
    "frozen": Frozen(checkpoint="other"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def run(teacher: Teacher, student: Network, steps: Iterable[int]) -> tuple[list[dict[str, Tensor]], ...]:
    """The teacher's weights during each step and after the last; the student's at the start of each and at the end."""
    teachers, students = [weights(teacher.network)], [weights(student)]
    for step in steps:
        train(student, step)
        teacher.follow(student, now(step))
        teachers.append(weights(teacher.network))
        students.append(weights(student))
    return teachers, students


# ----------------------------------------------------------------------------------------- which weights, and when


@pytest.mark.parametrize(
    ("kind", "begun"),
    [
        ("student_copy", lambda step: step),
        ("previous_iteration", lambda step: max(step - 1, 0)),
        ("previous_epoch", lambda step: step // STEPS_PER_EPOCH * STEPS_PER_EPOCH),
    ],
    ids=["student_copy", "previous_iteration", "previous_epoch"],
)
def test_in_each_step_the_teacher_is_to_the_bit_the_student_that_began_the_step_of_its_kind(
    kind: str, begun: Callable[[int], int], tmp_path: Path
) -> None:
    student = network()
    teachers, students = run(KINDS[kind].build(student, trials_dir=tmp_path), student, range(STEPS))
    assert len(teachers) == STEPS + 1
    for step, teacher in enumerate(teachers):
        equal = [t for t in range(STEPS + 1) if same(teacher, students[t])]
        assert equal == [begun(step)]


def test_a_teacher_with_momentum_is_the_weighted_sum_of_all_students_so_far(tmp_path: Path) -> None:
    """teacher_n = sum_t (1 - m_t) (prod_{u > t} m_u) student_{t+1} + (prod_t m_t) student_0."""
    student = network()
    settings = Momentum(momentum_teacher=0.6, momentum_teacher_end=0.9)
    teachers, students = run(settings.build(student, trials_dir=tmp_path), student, range(STEPS))
    m = [0.9 - 0.3 * (1 + math.cos(math.pi * t / STEPS)) / 2 for t in range(STEPS)]
    for n in range(STEPS + 1):
        for name, ours in teachers[n].items():
            expected = math.prod(m[:n]) * students[0][name].double()
            for t in range(n):
                expected += (1 - m[t]) * math.prod(m[t + 1 : n]) * students[t + 1][name].double()
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_teacher_never_moves(trials_dir: Path) -> None:
    student = network()
    teachers, _ = run(KINDS["frozen"].build(student, trials_dir=trials_dir), student, range(STEPS))
    assert all(same(teacher, weights(network(9))) for teacher in teachers)


def test_momentum_rises_from_its_start_to_its_end_over_all_steps() -> None:
    settings = Momentum(momentum_teacher=0.9, momentum_teacher_end=1.0)
    values = [settings.momentum_at(Now(step, steps=100, steps_per_epoch=10, measured=False)) for step in range(101)]
    assert values[0] == pytest.approx(0.9)
    assert values[50] == pytest.approx(0.95)
    assert values[100] == pytest.approx(1.0)
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("kind", "measures"),
    [
        ("momentum", {records.MOMENTUM_TEACHER: pytest.approx(1 - 0.3 * (1 + math.cos(math.pi * 2 / STEPS)) / 2)}),
        ("student_copy", {records.MOMENTUM_TEACHER: 0.0}),
        ("previous_iteration", {}),
        ("previous_epoch", {}),
        ("frozen", {}),
    ],
)
def test_a_teacher_shows_its_momentum_if_it_has_one(kind: str, measures: dict[str, Any], trials_dir: Path) -> None:
    assert KINDS[kind].build(network(), trials_dir=trials_dir).measures(now(2)) == measures


# ---------------------------------------------------------------------------------------- what all kinds have in common


@every_kind
def test_a_teacher_starts_as_its_student_unless_it_is_frozen(kind: str, trials_dir: Path) -> None:
    student = network()
    teacher = KINDS[kind].build(student, trials_dir=trials_dir)
    assert same(weights(teacher.network), weights(network(9) if kind == "frozen" else student))


@every_kind
def test_the_student_and_all_running_statistics_are_left_alone_by_following(kind: str, trials_dir: Path) -> None:
    student = network()
    teacher = KINDS[kind].build(student, trials_dir=trials_dir)
    for step in range(STEPS):
        train(student, step)
        students = copy.deepcopy(student.state_dict())
        buffers = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
        teacher.follow(student, now(step))
        assert same(students, student.state_dict())
        assert same(buffers, dict(teacher.named_buffers()))
    assert buffers
    theirs = dict(student.named_buffers())
    assert not any(torch.equal(ours, theirs[name]) for name, ours in teacher.network.named_buffers())


@every_kind
def test_a_teacher_has_backbone_and_head_and_no_predictor(kind: str, trials_dir: Path) -> None:
    student = network()
    teacher = KINDS[kind].build(student, trials_dir=trials_dir)
    assert teacher.network.predictor is None
    assert not any("predictor" in name for name in teacher.state_dict())
    names = {name for name in student.state_dict() if not name.startswith("predictor.")}
    assert set(teacher.network.state_dict()) == names


@every_kind
def test_the_teacher_is_judged_first_unless_it_was_given(kind: str, trials_dir: Path) -> None:
    student = network()
    teacher = KINDS[kind].build(student, trials_dir=trials_dir)
    both = [("teacher", teacher.network), ("student", student)]
    assert list(teacher.networks(student).items()) == (both[1:] if kind == "frozen" else both)


@every_kind
def test_a_teacher_gets_no_gradient_and_the_student_keeps_its_own(kind: str, trials_dir: Path) -> None:
    student = network()
    learned = [parameter.requires_grad for parameter in student.parameters()]
    teacher = KINDS[kind].build(student, trials_dir=trials_dir)
    crops = [part.requires_grad_() for part in images()]
    logits, features = teacher(crops)
    assert not logits.requires_grad
    assert not features.requires_grad
    for step in range(STEPS):
        train(student, step)
        teacher.follow(student, now(step))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert [parameter.requires_grad for parameter in student.parameters()] == learned


@every_kind
def test_a_teacher_has_no_drop_path_and_its_student_keeps_it(kind: str, trials_dir: Path) -> None:
    student = network()
    teacher = KINDS[kind].build(student, trials_dir=trials_dir)
    assert not torch.equal(student.backbone(images()[0][0]), student.backbone(images()[0][0]))
    assert torch.equal(teacher.network.backbone(images()[0][0]), teacher.network.backbone(images()[0][0]))


@every_kind
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_a_teachers_batch_norm_uses_the_statistics_of_the_batch(kind: str, name: str, tmp_path: Path) -> None:
    """So it equals a network in training, with its predictor and drop path left out."""
    backbone = VIT.but({"drop_path_rate": 0.0}) if name == VIT.name else Backbone(name=name, drop_path_rate=0.0)
    student = network(9, backbone)
    student.predictor = None
    written(tmp_path / "other" / checkpoint.CHECKPOINT, as_student(student))
    teacher = KINDS[kind].build(student, trials_dir=tmp_path)
    for ours, theirs in zip(teacher(images()), student(images()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    norms = [module for module in teacher.network.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert norms
    assert all(norm.num_batches_tracked == 1 for norm in norms)


@every_kind
@pytest.mark.parametrize("killed_at", [1, 3, 4])
def test_a_teacher_resumed_in_the_middle_of_training_goes_on_to_the_same_bits(
    kind: str, killed_at: int, trials_dir: Path
) -> None:
    student = network()
    whole, _ = run(KINDS[kind].build(student, trials_dir=trials_dir), student, range(STEPS))

    student = network()
    teacher = KINDS[kind].build(student, trials_dir=trials_dir)
    run(teacher, student, range(killed_at))
    checkpoint.save(trials_dir / "c.pt", {"teacher": teacher.state_dict(), "student": student.state_dict()})

    state = checkpoint.load(trials_dir / "c.pt")
    student = network(1)
    teacher = KINDS[kind].build(student, trials_dir=trials_dir)
    teacher.load_state_dict(state["teacher"])
    student.load_state_dict(state["student"])
    rest, _ = run(teacher, student, range(killed_at, STEPS))
    assert all(same(ours, theirs) for ours, theirs in zip(rest, whole[killed_at:], strict=True))


# ------------------------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize("by", ["path", "trial"])
def test_a_frozen_teacher_is_read_from_a_file_or_from_a_trial(by: str, trials_dir: Path) -> None:
    elsewhere = written(trials_dir / "elsewhere" / FILE, as_student(network(8)))
    seed, name = (8, str(elsewhere)) if by == "path" else (9, "other")
    teacher = Frozen(checkpoint=name).build(network(), trials_dir=trials_dir)
    assert same(weights(teacher.network), weights(network(seed)))


@pytest.mark.parametrize("kind", ["momentum", "previous_iteration"])
def test_of_a_trial_with_a_teacher_that_teacher_is_read_with_its_running_statistics(kind: str, tmp_path: Path) -> None:
    settings = DINO(head=HEAD, predictor=PREDICTOR, teacher=KINDS[kind])
    method = settings.build(VIT.build(16), Surroundings(10, image_size=16, global_crops_number=2, trials_dir=tmp_path))
    method.teacher(images())
    for step in range(3):
        train(method.student, step)
        method.teacher.follow(method.student, now(step))
    assert not same(weights(method.teacher.network), weights(method.student))
    written(tmp_path / "dino" / checkpoint.CHECKPOINT, method.state_dict())
    teacher = Frozen(checkpoint="dino").build(network(), trials_dir=tmp_path)
    assert same(dict(teacher.network.state_dict()), dict(method.teacher.network.state_dict()))


@pytest.mark.parametrize("name", ["no-such-trial", "folder/no-such-file.pt", "empty"])
def test_a_checkpoint_that_is_not_there_is_named(name: str, trials_dir: Path) -> None:
    (trials_dir / "empty").mkdir()
    with pytest.raises(ValueError, match=f"checkpoint '{name}'.*neither a file nor a trial") as error:
        Frozen(checkpoint=name).build(network(), trials_dir=trials_dir)
    assert str(trials_dir) in str(error.value)


def test_a_checkpoint_cut_short_is_a_runtime_error(trials_dir: Path) -> None:
    file = trials_dir / "other" / checkpoint.CHECKPOINT
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(RuntimeError, match="cannot be read"):
        Frozen(checkpoint="other").build(network(), trials_dir=trials_dir)


def test_a_checkpoint_of_another_architecture_is_a_value_error_that_names_it(trials_dir: Path) -> None:
    student = network(0, VIT.but({"embed_dim": 24}))
    with pytest.raises(ValueError, match="other"):
        Frozen(checkpoint="other").build(student, trials_dir=trials_dir)


def test_a_frozen_teacher_needs_a_checkpoint() -> None:
    with pytest.raises(KnobError, match=r"teacher.*checkpoint"):
        DINO.of({"teacher": {"kind": "frozen"}})


# --------------------------------------------------------------------------------------------------------------- move


def pair() -> tuple[nn.Module, nn.Module]:
    """Two networks of the same architecture with weights of their own."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
        student[1].running_mean.fill_(5)
    return teacher, student


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.5, 0.996, 1.0])
def test_a_network_moves_by_one_minus_its_momentum(momentum: float) -> None:
    teacher, student = pair()
    old = [parameter.clone() for parameter in teacher.parameters()]
    move(teacher, student, 1 - momentum)
    for before, after, new in zip(old, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(after, momentum * before + (1 - momentum) * new.detach())


def test_weight_zero_holds_a_network_to_the_bit() -> None:
    teacher, student = pair()
    old = [parameter.clone() for parameter in teacher.parameters()]
    move(teacher, student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(old, teacher.parameters(), strict=True))


def test_weight_one_copies_the_student_to_the_bit() -> None:
    teacher, student = pair()
    move(teacher, student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_weight_a_half_over_n_moves_leaves_two_to_the_minus_n_of_the_distance() -> None:
    teacher, student = pair()
    distance = [(a - b).detach() for a, b in zip(teacher.parameters(), student.parameters(), strict=True)]
    for _ in range(5):
        move(teacher, student, 0.5)
    for start, a, b in zip(distance, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close((a - b).detach(), start / 32)


def test_the_student_and_the_networks_buffers_are_left_alone_by_a_move() -> None:
    teacher, student = pair()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    move(teacher, student, 0.5)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert teacher[1].running_mean.abs().max() == 0


def test_parameters_are_matched_by_name_and_what_only_the_student_has_is_left_out() -> None:
    teacher, student = network(0), network(1)
    teacher.predictor = None
    reordered = nn.ModuleDict({name: getattr(student, name) for name in ("predictor", "head", "backbone")})
    move(teacher, reordered, 1.0)
    assert same(weights(teacher), weights(student))
