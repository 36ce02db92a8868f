"""What to try: every advice is given where its settings are, and is none any more once it is followed."""

from typing import Any, get_args

import pytest

from dino_lab.advice import REMEDIES, advice_against
from dino_lab.core.diagnostics.collapse import Kind
from dino_lab.core.records import COLLAPSES
from dino_lab.core.settings import Knob
from dino_lab.core.trial import Trial

LONG = 100_000
"""Steps of a run in which nothing lags."""

# By what is tried: settings that call for it, a kind that it is for, and steps of the run.
CASES: dict[str, tuple[dict[str, Any], Kind, int]] = {
    "turn sharpening on": ({"method.loss.sharpening": False}, "uniform", LONG),
    "start the teacher at 0.04; warm it up to 0.07 at most": ({"method.loss.teacher_temp": 0.08}, "uniform", LONG),
    "end its warm-up at 0.07 or below": (
        {
            "method.loss.teacher_temp": 0.09,
            "method.loss.warmup_teacher_temp": 0.04,
            "method.loss.warmup_teacher_temp_epochs": 1,
        },
        "uniform",
        LONG,
    ),
    "give the student 0.1, and the teacher 0.04 to 0.07": ({"method.loss.student_temp": 0.04}, "uniform", LONG),
    "give the head its bottleneck, or two layers": ({"method.head.kind": "mlp"}, "uniform", LONG),
    "even out more targets over fewer prototypes, or centre them": (
        {"method.operation.kind": "sinkhorn"},
        "uniform",
        LONG,
    ),
    "make the teacher colder, 0.02 or 0.03": ({}, "uniform", LONG),
    "make the teacher a moving average of the student, with weights of its own": (
        {"method.teacher.kind": "student_copy"},
        "constant",
        LONG,
    ),
    "slow it down: 0.98 in some hundred steps, 0.996 in the paper's 100,000": (
        {"method.teacher.momentum_teacher": 0.9},
        "constant",
        LONG,
    ),
    "turn centring on": ({"method.operation.kind": "none"}, "one_prototype", LONG),
    "let the centre follow: 0.9": ({"method.operation.center_momentum": 0.999}, "one_prototype", LONG),
    "warm the teacher to 0.04": ({"method.loss.teacher_temp": 0.0}, "few_prototypes", LONG),
    "let the centre be that of the last batch": ({}, "one_prototype", LONG),
    "give the student a predictor": ({"method.kind": "byol", "method.predictor.kind": "none"}, "constant", LONG),
    "widen the bottleneck": ({"method.head.bottleneck_dim": 2}, "dimensional", LONG),
    "widen the head's hidden layers": ({"method.head.hidden_dim": 3}, "dimensional", LONG),
    "take a wider backbone": ({"backbone.embed_dim": 6}, "dimensional", LONG),
    "lower weight decay: 0.04 to 0.4": (
        {"optimizer.weight_decay": 3.0, "optimizer.weight_decay_end": 3.0},
        "dimensional",
        LONG,
    ),
    "raise optimizer.lr until it reaches 0.001 to 0.003 for this batch": ({"optimizer.lr": 1e-5}, "not_started", LONG),
    "let the teacher follow the student": (
        {"method.teacher.momentum_teacher": 1.0, "method.teacher.momentum_teacher_end": 1.0},
        "not_started",
        LONG,
    ),
    "let the teacher follow sooner, 0.98, or train for longer": (
        {"method.teacher.momentum_teacher": 0.996},
        "not_started",
        500,
    ),
    "warm the learning rate up for a tenth to a half of the run": (
        {"optimizer.warmup_epochs": 2.5},
        "not_started",
        LONG,
    ),
    "train for longer before judging": ({}, "not_started", LONG),
    "clip gradients at 3, or 0.3 for larger networks": ({"optimizer.clip_grad": 0.0}, "diverged", LONG),
    "train in full precision": ({"precision": "bf16"}, "diverged", LONG),
    "lower optimizer.lr until it reaches 0.001 to 0.003 for this batch": ({"optimizer.lr": 1.0}, "diverged", LONG),
    "halve optimizer.lr, or lengthen its warm-up": ({}, "diverged", LONG),
}


@pytest.fixture
def healthy(smoke: Trial) -> Trial:
    """Settings against which nothing is known."""
    return smoke.but({"method.teacher.momentum_teacher": 0.99, "backbone.embed_dim": 24})


def tried(trial: Trial | None, *kinds: Kind, steps: int | None = LONG) -> list[str]:
    return [advice.what for advice in advice_against(kinds, trial, steps)]


@pytest.mark.parametrize("what", CASES)
def test_advice_is_given_for_its_settings_and_its_kind(healthy: Trial, what: str) -> None:
    changes, kind, steps = CASES[what]
    assert what in tried(healthy.but(changes), kind, steps=steps)
    assert what not in tried(healthy.but(changes), "none", steps=steps)


@pytest.mark.parametrize("what", [what for what, (changes, _, _) in CASES.items() if changes])
def test_advice_is_not_given_where_the_settings_are_in_order(healthy: Trial, what: str) -> None:
    assert what not in tried(healthy, CASES[what][1])


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda remedy: remedy.advice.what)
def test_advice_that_is_followed_is_not_given_again(healthy: Trial, remedy: Any) -> None:
    changes, kind, steps = CASES[remedy.advice.what]
    if followed := remedy.advice.changes:
        again = tried(healthy.but(changes).but(followed), kind, steps=steps)
        assert remedy.is_last or remedy.advice.what not in again


def test_every_remedy_has_a_case_and_every_kind_a_remedy() -> None:
    assert {remedy.advice.what for remedy in REMEDIES} == set(CASES)
    assert len(REMEDIES) == len(CASES)
    kinds = {kind for remedy in REMEDIES for kind in remedy.kinds}
    assert kinds == set(get_args(Kind)) - {"none"}
    assert set(COLLAPSES) <= kinds


def test_what_is_general_is_said_only_where_nothing_is_known_of_the_settings(healthy: Trial) -> None:
    assert tried(healthy, "uniform") == ["make the teacher colder, 0.02 or 0.03"]
    assert tried(healthy.but({"method.loss.sharpening": False}), "uniform") == ["turn sharpening on"]


@pytest.mark.parametrize(
    ("momentum", "steps", "lags"), [(0.9, 99, True), (0.9, 101, False), (0.99, 500, True), (0.99, 2000, False)]
)
def test_a_centre_is_late_if_it_follows_over_more_than_a_tenth_of_the_run(
    healthy: Trial, momentum: float, steps: int, lags: bool
) -> None:
    trial = healthy.but({"method.operation.center_momentum": momentum})
    assert ("let the centre follow: 0.9" in tried(trial, "one_prototype", steps=steps)) == lags
    assert "let the centre follow: 0.9" not in tried(trial, "one_prototype", steps=None)


def test_a_warm_up_of_the_teacher_is_judged_by_where_it_starts(healthy: Trial) -> None:
    hot = "start the teacher at 0.04; warm it up to 0.07 at most"
    warmed: dict[str, Knob] = {"method.loss.teacher_temp": 0.07, "method.loss.warmup_teacher_temp_epochs": 2}
    assert hot not in tried(healthy.but(warmed), "uniform")
    assert hot in tried(healthy.but(warmed | {"method.loss.warmup_teacher_temp": 0.065}), "uniform")


def test_without_settings_all_of_a_kind_is_said_the_general_last() -> None:
    said = tried(None, "uniform")
    assert set(said) == {remedy.advice.what for remedy in REMEDIES if "uniform" in remedy.kinds}
    assert said[-1] == "make the teacher colder, 0.02 or 0.03"


def test_two_kinds_share_their_advice(healthy: Trial) -> None:
    said = tried(healthy.but({"method.teacher.kind": "previous_iteration"}), "uniform", "constant")
    assert len(said) == len(set(said)) == 1


def test_every_advice_has_a_reason_and_a_source() -> None:
    for remedy in REMEDIES:
        assert all((remedy.advice.when, remedy.advice.why, remedy.advice.source))
