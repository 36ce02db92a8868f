import math
from collections.abc import Iterable

import pytest

from dino_lab.core import records
from dino_lab.core.diagnostics.collapse import Collapse, Verdict
from dino_lab.core.settings import KnobError

K = 1024
BOUNDS = Collapse(certain_steps=40)

# (teacher entropy, marginal entropy, KL), as fractions of ln K
HEALTHY = (0.3, 0.9, 0.2)
SHARP = (0.001, 0.95, 0.01)
UNIFORM = (0.999, 0.9995, 0.001)
ONE_PROTOTYPE = (0.001, 0.001, 0.0005)
START = (0.99, 0.995, 0.1)
SAME = (0.5, 0.505, 0.3)


def values(state: tuple[float, float, float], out_dim: int = K) -> dict[str, float]:
    entropy, marginal, kl = (fraction * math.log(out_dim) for fraction in state)
    return {records.TEACHER_ENTROPY: entropy, records.MARGINAL_ENTROPY: marginal, records.KL: kl}


def verdicts(
    states: Iterable[tuple[float, float, float]], *, period: int = 10, bounds: Collapse = BOUNDS, out_dim: int = K
) -> list[Verdict]:
    """After each record; the first is of step `period`."""
    verdict, seen = Verdict(), []
    for i, state in enumerate(states, start=1):
        verdict = verdict.after(period * i, values(state, out_dim), out_dim=out_dim, bounds=bounds)
        seen.append(verdict)
    return seen


@pytest.mark.parametrize(("state", "kind"), [(UNIFORM, "uniform"), (ONE_PROTOTYPE, "one_prototype")])
@pytest.mark.parametrize("out_dim", [2, 256, 65536])
def test_a_collapse_is_called_once_certain_and_dated_to_its_first_record(
    state: tuple[float, float, float], kind: str, out_dim: int
) -> None:
    seen = verdicts([HEALTHY] * 3 + [state] * 6, out_dim=out_dim)
    assert [verdict.kind for verdict in seen] == ["none"] * 7 + [kind] * 2  # signs from step 40 on, certain at 80
    assert [verdict.onset_step for verdict in seen] == [None] * 7 + [40, 40]


@pytest.mark.parametrize("state", [HEALTHY, SHARP, START], ids=["healthy", "sharp", "flat, but not yet followed"])
def test_a_living_trial_is_called_none(state: tuple[float, float, float]) -> None:
    assert {(verdict.kind, verdict.onset_step) for verdict in verdicts([state] * 50)} == {("none", None)}


def test_a_collapse_that_ends_is_taken_back() -> None:
    seen = verdicts([UNIFORM] * 8 + [HEALTHY] * 3)
    assert seen[7].kind == "uniform"
    assert [(verdict.kind, verdict.onset_step) for verdict in seen[8:]] == [("none", None)] * 3


def test_a_collapse_that_comes_back_is_dated_anew() -> None:
    seen = verdicts([UNIFORM] * 8 + [HEALTHY] + [UNIFORM] * 8)
    assert (seen[-1].kind, seen[-1].onset_step) == ("uniform", 100)


def test_signs_that_break_off_before_they_are_certain_are_no_collapse() -> None:
    assert {verdict.kind for verdict in verdicts(([UNIFORM] * 4 + [HEALTHY]) * 5)} == {"none"}


def test_a_collapse_that_changes_its_kind_keeps_its_date() -> None:
    seen = verdicts([HEALTHY] + [UNIFORM] * 8 + [SAME] + [ONE_PROTOTYPE] * 8)
    assert [seen[8].kind, seen[9].kind, seen[-1].kind] == ["uniform", "constant", "one_prototype"]
    assert {verdict.onset_step for verdict in seen[5:]} == {20}


@pytest.mark.parametrize("state", [SAME, (0.999, 0.9995, 0.3), (0.0, 0.0, 0.3)], ids=["middling", "flat", "one-hot"])
def test_the_same_target_for_every_image_is_called_constant_whatever_the_student_does(
    state: tuple[float, float, float],
) -> None:
    seen = verdicts([HEALTHY] * 3 + [state] * 6)
    assert [verdict.kind for verdict in seen] == ["none"] * 7 + ["constant"] * 2
    assert seen[-1].onset_step == 40


@pytest.mark.parametrize("information", [0.009, 0.011])
@pytest.mark.parametrize("out_dim", [64, K])
def test_the_bound_of_same_targets_is_a_fraction_of_ln_k(information: float, out_dim: int) -> None:
    seen = verdicts([HEALTHY] + [(0.5, 0.5 + information, 0.3)] * 6, out_dim=out_dim)
    assert seen[-1].kind == ("constant" if information < 0.01 else "none")


def test_a_trial_that_never_told_images_apart_has_not_begun() -> None:
    assert {verdict.kind for verdict in verdicts([SAME] * 50)} == {"none"}
    assert verdicts([SAME] * 5 + [HEALTHY] + [SAME] * 6)[-1].onset_step == 70


def test_the_verdict_may_be_given_at_once() -> None:
    first, *_ = verdicts([UNIFORM], bounds=Collapse(certain_steps=0))
    assert (first.kind, first.onset_step) == ("uniform", 10)


@pytest.mark.parametrize("period", [1, 5, 20, 40])
def test_certainty_is_counted_in_steps_whatever_the_period_of_records(period: int) -> None:
    seen = verdicts([UNIFORM] * 100, period=period)
    called = next(i for i, verdict in enumerate(seen, start=1) if verdict.kind == "uniform")
    assert called * period == period + 40


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ((0.979, 0.99, 0.0), "none"),
        ((0.981, 0.99, 0.0), "uniform"),
        ((0.019, 0.019, 0.0), "one_prototype"),
        ((0.019, 0.021, 0.0), "none"),
        ((0.021, 0.019, 0.0), "none"),
        ((0.99, 0.99, 0.021), "none"),
        ((0.001, 0.001, 0.021), "none"),
    ],
)
def test_bounds_are_fractions_of_ln_k(state: tuple[float, float, float], kind: str) -> None:
    assert verdicts([state] * 5)[-1].kind == kind
    assert verdicts([state] * 5, out_dim=64)[-1].kind == kind


def test_bounds_that_overlap_are_refused() -> None:
    with pytest.raises(KnobError, match=r"one_prototype_entropy = 0.5: must be below collapse.uniform_entropy = 0.4"):
        Collapse().but({"uniform_entropy": 0.4, "one_prototype_entropy": 0.5})


# ----------------------------------------------------------------------------- outputs that are no distributions


def verdicts_on_outputs(stds: Iterable[float | None], *, bounds: Collapse = BOUNDS) -> list[Verdict]:
    """After each record, ten steps apart, of a method without targets; None is a method without outputs too."""
    verdict, seen = Verdict(), []
    for i, std in enumerate(stds, start=1):
        shown = {records.LOSS: 0.0} if std is None else {records.LOSS: 0.0, records.OUTPUT_STD: std}
        verdict = verdict.after(10 * i, shown, out_dim=None, bounds=bounds)
        seen.append(verdict)
    return seen


def test_equal_outputs_are_called_constant_once_certain_and_dated_to_their_first_record() -> None:
    seen = verdicts_on_outputs([0.9] * 3 + [0.001] * 6)
    assert [verdict.kind for verdict in seen] == ["none"] * 7 + ["constant"] * 2
    assert [verdict.onset_step for verdict in seen] == [None] * 7 + [40, 40]


def test_outputs_that_differ_again_take_the_verdict_back() -> None:
    seen = verdicts_on_outputs([0.001] * 8 + [0.9] + [0.001] * 8)
    assert [seen[7].kind, seen[8].kind] == ["constant", "none"]
    assert (seen[-1].kind, seen[-1].onset_step) == ("constant", 100)


@pytest.mark.parametrize(("std", "kind"), [(0.0, "constant"), (0.019, "constant"), (0.021, "none"), (1.0, "none")])
def test_the_bound_of_constant_outputs_is_the_knobs(std: float, kind: str) -> None:
    assert verdicts_on_outputs([std] * 5)[-1].kind == kind
    assert verdicts_on_outputs([std * 10] * 5, bounds=Collapse(constant_std=0.2))[-1].kind == kind


@pytest.mark.parametrize("std", [None, math.nan])
def test_a_method_without_outputs_or_with_a_single_one_is_called_none(std: float | None) -> None:
    """A deviation over a single image is not a number."""
    assert {verdict.kind for verdict in verdicts_on_outputs([std] * 50)} == {"none"}


@pytest.mark.parametrize(("state", "kind"), [(HEALTHY, "none"), (UNIFORM, "uniform"), (ONE_PROTOTYPE, "one_prototype")])
def test_where_there_are_targets_they_are_judged_and_not_the_outputs(
    state: tuple[float, float, float], kind: str
) -> None:
    shown = values(state) | {records.OUTPUT_STD: 0.0}
    assert Verdict().after(10, shown, out_dim=K, bounds=Collapse(certain_steps=0)).kind == kind
