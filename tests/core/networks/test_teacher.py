import pytest
import torch
from torch import nn

from dino_lab.core.networks.teacher import MomentumTeacher, teacher_of, update_teacher


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = teacher_of(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
        student[1].running_mean.fill_(5)
    return teacher, student


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.5, 0.996, 1.0])
def test_the_teacher_moves_by_one_minus_its_momentum(momentum: float) -> None:
    teacher, student = networks()
    old = [parameter.clone() for parameter in teacher.parameters()]
    update_teacher(teacher, student, momentum)
    for before, after, new in zip(old, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(after, momentum * before + (1 - momentum) * new.detach())


def test_momentum_one_holds_the_teacher_to_the_bit() -> None:
    teacher, student = networks()
    old = [parameter.clone() for parameter in teacher.parameters()]
    update_teacher(teacher, student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(old, teacher.parameters(), strict=True))


def test_momentum_zero_copies_the_student_to_the_bit() -> None:
    teacher, student = networks()
    update_teacher(teacher, student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_momentum_a_half_over_n_updates_leaves_two_to_the_minus_n_of_the_distance() -> None:
    teacher, student = networks()
    distance = [(a - b).detach() for a, b in zip(teacher.parameters(), student.parameters(), strict=True)]
    for _ in range(5):
        update_teacher(teacher, student, 0.5)
    for start, a, b in zip(distance, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close((a - b).detach(), start / 32)


def test_the_student_and_the_teachers_buffers_are_left_alone() -> None:
    teacher, student = networks()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    update_teacher(teacher, student, 0.5)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert teacher[1].running_mean.abs().max() == 0


def test_a_teacher_starts_as_its_student_without_gradient_and_in_evaluation() -> None:
    student = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    teacher = teacher_of(student)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher[1].training
    assert student[1].training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_momentum_rises_from_its_start_to_its_end_over_all_steps() -> None:
    settings = MomentumTeacher(momentum_teacher=0.9, momentum_teacher_end=1.0)
    values = [settings.momentum_at(step, steps=100) for step in range(101)]
    assert values[0] == pytest.approx(0.9)
    assert values[50] == pytest.approx(0.95)
    assert values[100] == pytest.approx(1.0)
    assert values == sorted(values)
