import math
import random
from collections.abc import Iterable
from typing import Any, get_args

import pytest

from dino_lab.core import records
from dino_lab.core.diagnostics.collapse import Collapse, Kind, Verdict
from dino_lab.core.settings import KnobError

K = 1024
BOUNDS = Collapse(certain_steps=40)

# (teacher entropy, mutual information, KL), as fractions of ln K
State = tuple[float, float, float]
HEALTHY = (0.3, 0.6, 0.2)
SHARP = (0.001, 0.95, 0.01)
UNIFORM = (0.999, 0.0005, 0.001)
ONE_PROTOTYPE = (0.001, 0.0, 0.0005)
FEW_PROTOTYPES = (0.001, math.log(2) / math.log(K), 0.001)
SAME = (0.5, 0.005, 0.3)


def values(state: State, out_dim: int = K) -> dict[str, float]:
    entropy, information, kl = (fraction * math.log(out_dim) for fraction in state)
    return {
        records.LOSS: entropy + kl,
        records.TEACHER_ENTROPY: entropy,
        records.KL: kl,
        records.MUTUAL_INFORMATION: information,
        records.PROTOTYPES_NUMBER: out_dim,
    }


def verdicts(
    shown: Iterable[dict[str, float] | State], *, period: int = 10, bounds: Collapse = BOUNDS, out_dim: int = K
) -> list[Verdict]:
    """After each record; the first is of step `period`."""
    verdict, seen = Verdict(), []
    for i, state in enumerate(shown, start=1):
        of_record = state if isinstance(state, dict) else values(state, out_dim)
        verdict = verdict.after(period * i, of_record, bounds=bounds)
        seen.append(verdict)
    return seen


@pytest.mark.parametrize(
    ("state", "kind"),
    [(UNIFORM, "uniform"), (ONE_PROTOTYPE, "one_prototype"), (SAME, "constant")],
)
@pytest.mark.parametrize("out_dim", [16, 256, 65536])
def test_a_collapse_is_called_once_certain_and_dated_to_its_first_record(state: State, kind: str, out_dim: int) -> None:
    seen = verdicts([HEALTHY] * 3 + [state] * 6, out_dim=out_dim)
    assert [verdict.kind for verdict in seen] == ["none"] * 7 + [kind] * 2  # signs from step 40 on, certain at 80
    assert [verdict.onset_step for verdict in seen] == [None] * 7 + [40, 40]


@pytest.mark.parametrize("state", [HEALTHY, SHARP], ids=["healthy", "sharp"])
def test_a_living_trial_is_called_none(state: State) -> None:
    assert {(verdict.kind, verdict.onset_step) for verdict in verdicts([state] * 50)} == {("none", None)}


def test_a_kind_that_is_no_collapse_is_known_and_all_have_a_meaning() -> None:
    assert set(records.VERDICTS) == set(get_args(Kind)) == {*records.COLLAPSES, "none", "not_started", "diverged"}


def test_signs_that_break_off_before_they_are_certain_are_no_collapse() -> None:
    assert {verdict.kind for verdict in verdicts(([UNIFORM] * 2 + [HEALTHY] * 2) * 10)} == {"none"}


def test_a_collapse_that_flickers_is_called_from_where_it_outweighs_what_is_none() -> None:
    """Four records add 40 steps of which one away takes 15; the first pair, 20, is gone after two."""
    seen = verdicts([HEALTHY] + [UNIFORM] * 2 + [HEALTHY] * 2 + ([UNIFORM] * 4 + [HEALTHY]) * 5)
    assert (seen[-1].kind, seen[-1].onset_step) == ("uniform", 60)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("period", [10, 30])
def test_kind_and_date_are_those_of_sums_as_a_plain_loop_makes_them(seed: int, period: int) -> None:
    drawn = random.Random(seed)
    signs = [drawn.random() < share for share in (0.3, 0.9, 0.5, 0.7) for _ in range(20)]
    kind, onset, total, since = "none", None, 0.0, None
    for i, sign in enumerate(signs, start=1):
        total = min(total + period, 40) if sign else max(total - 1.5 * period, 0)
        since = None if total == 0 else i * period if since is None else since
        if since is None:
            kind, onset = "none", None
        elif kind == "few_prototypes" or (sign and i * period - since >= 40):
            kind, onset = "few_prototypes", since
    last = verdicts([FEW_PROTOTYPES if sign else HEALTHY for sign in signs], period=period)[-1]
    assert (last.kind, last.onset_step) == (kind, onset)


# ------------------------------------------------------------------------------------------------ what is left


def test_a_collapse_is_left_after_two_thirds_of_the_certain_steps_away_and_is_remembered() -> None:
    seen = verdicts([HEALTHY] + [UNIFORM] * 8 + [HEALTHY] * 5)
    assert [verdict.kind for verdict in seen[5:]] == ["uniform"] * 6 + ["none"] * 3
    assert [verdict.onset_step for verdict in seen[5:]] == [20] * 6 + [None] * 3
    assert [verdict.left for verdict in seen[-4:]] == [(), *[(("uniform", 20, 100),)] * 3]


def test_a_short_absence_takes_nothing_back_and_changes_no_date() -> None:
    seen = verdicts([HEALTHY] + [UNIFORM] * 8 + [HEALTHY] * 2 + [UNIFORM] * 8)
    assert {(verdict.kind, verdict.onset_step) for verdict in seen[6:]} == {("uniform", 20)}
    assert seen[-1].left == ()


def test_a_collapse_that_lasts_for_long_is_left_as_quickly_as_one_that_has_just_been_called() -> None:
    for records_number in (5, 50):
        seen = verdicts([HEALTHY] + [UNIFORM] * records_number + [HEALTHY] * 3)
        assert [verdict.kind for verdict in seen[-3:]] == ["uniform", "uniform", "none"]


def test_a_collapse_that_comes_back_after_it_was_left_is_dated_anew() -> None:
    seen = verdicts([HEALTHY] + [UNIFORM] * 8 + [HEALTHY] * 6 + [ONE_PROTOTYPE] * 8)
    assert (seen[-1].kind, seen[-1].onset_step, seen[-1].left) == ("one_prototype", 160, (("uniform", 20, 100),))


def test_a_collapse_that_becomes_another_has_its_name_and_its_date_but_is_not_left() -> None:
    """Forty steps of few prototypes lose 15 with each record of one; that has 20 when they have 10."""
    seen = verdicts([HEALTHY] + [FEW_PROTOTYPES] * 8 + [ONE_PROTOTYPE] * 4)
    assert [(verdict.kind, verdict.onset_step) for verdict in seen[5:]] == (
        [("few_prototypes", 20)] * 5 + [("one_prototype", 100)] * 3
    )
    assert (seen[-1].first_sign, seen[-1].left) == (("few_prototypes", 20), ())


def test_a_collapse_is_certain_from_its_first_sign_though_it_had_another_name_then() -> None:
    seen = verdicts([HEALTHY] * 3 + [FEW_PROTOTYPES] * 2 + [ONE_PROTOTYPE] * 4)
    assert [(verdict.kind, verdict.onset_step) for verdict in seen] == (
        [("none", None)] * 7 + [("one_prototype", 60)] * 2
    )


# ------------------------------------------------------------------------------ constant and its narrower kinds


@pytest.mark.parametrize(("narrow", "kind"), [(UNIFORM, "uniform"), (ONE_PROTOTYPE, "one_prototype")])
def test_a_narrower_kind_names_a_collapse_until_it_has_been_away_for_some_records(narrow: State, kind: str) -> None:
    seen = verdicts([HEALTHY] + [narrow] * 8 + [SAME] * 3)
    assert [(verdict.kind, verdict.onset_step) for verdict in seen[-4:]] == [(kind, 20)] * 2 + [("constant", 20)] * 2


def test_targets_that_are_the_same_but_of_no_single_narrower_kind_are_constant_since_they_are_the_same() -> None:
    for number in (3, 30):
        seen = verdicts([HEALTHY] * 3 + [UNIFORM, ONE_PROTOTYPE] * number)
        assert (seen[-1].kind, seen[-1].onset_step) == ("constant", 40)


def test_a_narrower_kind_that_wanders_keeps_its_date_for_twice_as_long_as_one_that_ends() -> None:
    """Of its forty steps each record with the same target for all takes 7.5, any other 15."""
    for away, kept in ((SAME, 5), (UNIFORM, 5), (HEALTHY, 2), (FEW_PROTOTYPES, 2)):
        for number in (kept, kept + 1):
            seen = verdicts([HEALTHY] + [ONE_PROTOTYPE] * 8 + [away] * number + [ONE_PROTOTYPE] * 8)
            onset = 20 if number == kept else 110 + 10 * kept
            assert (seen[-1].kind, seen[-1].onset_step) == ("one_prototype", onset)


def test_a_kind_outside_these_loses_as_much_by_them_as_by_any_other() -> None:
    for away in (SAME, HEALTHY, ONE_PROTOTYPE):
        for number, onset in ((2, 20), (3, 130)):
            seen = verdicts([HEALTHY] + [FEW_PROTOTYPES] * 8 + [away] * number + [FEW_PROTOTYPES] * 8)
            assert (seen[-1].kind, seen[-1].onset_step) == ("few_prototypes", onset)


def test_a_record_that_shows_nothing_renames_no_collapse() -> None:
    seen = verdicts([HEALTHY] + [UNIFORM] * 8 + [SAME] + [HEALTHY] * 3)
    assert [verdict.kind for verdict in seen[-4:]] == ["uniform"] * 3 + ["none"]
    assert seen[-1].left == (("uniform", 20, 110),)


def test_the_date_does_not_depend_on_the_step_at_which_records_begin() -> None:
    shown = [values(state) for state in [ONE_PROTOTYPE] + [HEALTHY] * 2 + [ONE_PROTOTYPE] * 10]
    for start in (0, 10, 5000):
        verdict = Verdict(has_moved=True, has_been_sharp=True)
        for i, record in enumerate(shown):
            verdict = verdict.after(start + 10 * i, record, bounds=BOUNDS)
        assert (verdict.kind, verdict.onset_step) == ("one_prototype", start + 30)


# ------------------------------------------------------------------------------------------ bounds and their kinds


@pytest.mark.parametrize("state", [SAME, (0.999, 0.0005, 0.3), (0.0, 0.0, 0.3)], ids=["middling", "flat", "one-hot"])
def test_the_same_target_for_every_image_is_called_constant_whatever_the_student_does(state: State) -> None:
    seen = verdicts([HEALTHY] * 3 + [state] * 6)
    assert [verdict.kind for verdict in seen] == ["none"] * 7 + ["constant"] * 2
    assert seen[-1].onset_step == 40


@pytest.mark.parametrize("information", [0.009, 0.011])
@pytest.mark.parametrize("out_dim", [64, K])
def test_the_bound_of_same_targets_is_a_fraction_of_ln_k(information: float, out_dim: int) -> None:
    seen = verdicts([HEALTHY] + [(0.5, information, 0.3)] * 6, out_dim=out_dim)
    assert seen[-1].kind == ("constant" if information < 0.01 else "none")


def test_flat_targets_of_a_trial_that_never_had_others_have_not_started() -> None:
    seen = verdicts([UNIFORM] * 20)
    assert [verdict.kind for verdict in seen] == ["none"] * 4 + ["not_started"] * 16
    assert verdicts([UNIFORM] * 20 + [HEALTHY])[-1].kind == "none"


@pytest.mark.parametrize("before", [(0.97, 0.02, 0.01), (0.999, 0.0005, 0.03)], ids=["sharper", "not yet followed"])
def test_flat_targets_that_had_been_sharper_or_that_the_student_came_to_follow_are_uniform(before: State) -> None:
    assert verdicts([before] + [UNIFORM] * 5)[-1].kind == "uniform"


def test_targets_that_never_differed_are_constant_once_they_are_not_flat() -> None:
    seen = verdicts([SAME] * 6)
    assert (seen[-1].kind, seen[-1].onset_step) == ("constant", 10)


def test_sharp_targets_on_two_prototypes_are_few() -> None:
    seen = verdicts([HEALTHY] * 3 + [FEW_PROTOTYPES] * 6)
    assert (seen[-1].kind, seen[-1].onset_step) == ("few_prototypes", 40)


@pytest.mark.parametrize(
    ("perplexity", "out_dim", "kind"),
    [(2.9, K, "few_prototypes"), (3.1, K, "none"), (2.9, 12, "few_prototypes"), (2.9, 11, "none"), (2.9, 4, "none")],
)
def test_few_is_three_of_at_least_twelve(perplexity: float, out_dim: int, kind: str) -> None:
    """Half of it from the targets' own entropy: what counts is that of their mean."""
    half = math.log(perplexity) / math.log(out_dim) / 2
    assert verdicts([(half, half, 0.3)] * 6, out_dim=out_dim)[-1].kind == kind


@pytest.mark.parametrize(("rank", "kind"), [(1.45, "dimensional"), (1.55, "none")])
@pytest.mark.parametrize("shown", [values(HEALTHY), {records.LOSS: 1.0, records.OUTPUT_STD: 0.5}])
def test_outputs_on_a_line_are_dimensional_though_targets_differ(
    shown: dict[str, float], rank: float, kind: str
) -> None:
    start = shown | {records.OUTPUT_RANK: 10.0}
    assert verdicts([start] + [shown | {records.OUTPUT_RANK: rank}] * 8)[-1].kind == kind


def test_a_target_that_is_the_same_for_all_is_not_called_dimensional() -> None:
    seen = verdicts([values(HEALTHY) | {records.OUTPUT_RANK: 10.0}] + [values(SAME) | {records.OUTPUT_RANK: 1.1}] * 8)
    assert seen[-1].kind == "constant"


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ((0.989, 0.011, 0.0), "none"),
        ((0.991, 0.011, 0.0), "uniform"),
        ((0.01, 0.009, 0.0), "one_prototype"),
        ((0.01, 0.011, 0.0), "few_prototypes"),
        ((0.001, 0.011, 0.021), "few_prototypes"),
    ],
)
def test_bounds_are_fractions_of_ln_k(state: State, kind: str) -> None:
    assert verdicts([HEALTHY] + [state] * 5)[-1].kind == kind
    assert verdicts([HEALTHY] + [state] * 5, out_dim=64)[-1].kind == kind


def test_flat_targets_that_the_student_has_not_followed_are_not_uniform() -> None:
    assert verdicts([HEALTHY] + [(0.995, 0.011, 0.021)] * 8)[-1].kind == "none"
    assert verdicts([HEALTHY] + [(0.995, 0.011, 0.019)] * 8)[-1].kind == "uniform"


def test_the_verdict_may_be_given_at_once() -> None:
    _, second = verdicts([HEALTHY, UNIFORM], bounds=Collapse(certain_steps=0))
    assert (second.kind, second.onset_step) == ("uniform", 20)


@pytest.mark.parametrize("period", [1, 5, 20, 40])
def test_certainty_is_counted_in_steps_whatever_the_period_of_records(period: int) -> None:
    seen = verdicts([HEALTHY] + [UNIFORM] * 100, period=period)
    called = next(i for i, verdict in enumerate(seen, start=1) if verdict.kind == "uniform")
    assert called * period == 2 * period + 40


@pytest.mark.parametrize(("steps", "certain"), [(500, 40), (2000, 40), (2001, 41), (100_000, 2000)])
def test_in_a_long_run_certainty_takes_a_fraction_of_it(steps: int, certain: int) -> None:
    assert Collapse().over(steps) == Collapse(certain_steps=certain)


def test_bounds_that_overlap_are_refused() -> None:
    with pytest.raises(KnobError, match=r"one_prototype_entropy = 0.5: must be below collapse.uniform_entropy = 0.4"):
        Collapse().but({"uniform_entropy": 0.4, "one_prototype_entropy": 0.5})


# ------------------------------------------------------------------------------------------- start and divergence


def geometry(scale: float) -> dict[str, float]:
    """Ranks and stds at a multiple of where they began."""
    return {
        records.EMBEDDING_RANK: 10 * scale,
        records.EMBEDDING_STD: 0.5 * scale,
        records.OUTPUT_RANK: 8 * scale,
        records.OUTPUT_STD: 0.6 * scale,
    }


def test_a_trial_that_stays_where_it_began_has_not_started() -> None:
    seen = verdicts(values(HEALTHY) | geometry(scale) for scale in (1.0, 0.8, 1.2, 1.29, 0.71, 1.1, 0.9))
    assert [verdict.kind for verdict in seen] == ["none"] * 4 + ["not_started"] * 3
    assert {verdict.onset_step for verdict in seen[4:]} == {10}


@pytest.mark.parametrize("name", geometry(1))
@pytest.mark.parametrize("change", [0.69, 1.31])
def test_it_has_started_once_a_rank_or_a_std_is_elsewhere_for_the_certain_steps(name: str, change: float) -> None:
    moved = values(HEALTHY) | geometry(1.0) | {name: change * geometry(1.0)[name]}
    still = values(HEALTHY) | geometry(1.0)
    assert verdicts([still] * 6 + ([moved] * 4 + [still]) * 3)[-1].kind == "not_started"
    assert verdicts([still] * 6 + [moved] * 5 + [still] * 6)[-1].kind == "none"
    gone = {key: value for key, value in still.items() if key != name}
    assert verdicts([still] * 6 + [gone] * 5)[-1].kind == "none", "what is no number any more is elsewhere too"


def test_what_moves_from_the_start_is_not_taken_to_stand_still_meanwhile() -> None:
    seen = verdicts(values(HEALTHY) | geometry(scale) for scale in (1.0, *[0.5] * 6))
    assert {verdict.kind for verdict in seen} == {"none"}


def test_what_is_now_here_and_now_elsewhere_is_not_called_to_stand_still() -> None:
    still, moved = (values(HEALTHY) | geometry(scale) for scale in (1.0, 0.5))
    assert {verdict.kind for verdict in verdicts([still] + ([moved] * 3 + [still]) * 10)} == {"none"}
    said = verdicts([still] * 6 + [moved] * 3)
    assert [verdict.kind for verdict in said[-5:]] == ["not_started"] * 5, "what was said stands until it has moved"


def test_flat_targets_from_the_start_have_not_started_though_the_network_moves() -> None:
    assert verdicts(values(UNIFORM) | geometry(scale) for scale in (1.0, *[0.5] * 6))[-1].kind == "not_started"


@pytest.mark.parametrize(("std", "kind"), [(0.0, "uniform"), (0.009, "uniform"), (0.011, "not_started")])
def test_what_is_the_same_for_all_images_from_the_start_does_not_show_that_a_network_stands_still(
    std: float, kind: str
) -> None:
    ranks = dict.fromkeys((records.EMBEDDING_RANK, records.OUTPUT_RANK), 1.04)
    alike = ranks | dict.fromkeys((records.EMBEDDING_STD, records.OUTPUT_STD), std)
    seen = verdicts(values(state) | alike for state in [ONE_PROTOTYPE] + [SAME] * 4 + [UNIFORM] * 8)
    assert (seen[-1].kind, seen[-1].onset_step) == (kind, 60 if kind == "uniform" else 10)


def test_a_network_that_stands_still_is_called_by_no_collapse_and_one_that_moves_later_from_its_first_sign() -> None:
    still, moved = (values(ONE_PROTOTYPE) | geometry(scale) for scale in (1.0, 0.5))
    assert verdicts([still] * 20)[-1].kind == "not_started"
    seen = verdicts([still] * 8 + [moved] * 5)
    assert (seen[-1].kind, seen[-1].onset_step) == ("one_prototype", 10)


def test_a_loss_that_is_no_number_is_diverged_at_once() -> None:
    seen = verdicts([values(HEALTHY)] * 2 + [{records.LOSS: math.nan}, {records.LOSS: math.inf}])
    assert [(verdict.kind, verdict.onset_step) for verdict in seen[1:]] == [("none", None), *[("diverged", 30)] * 2]


def test_the_record_of_the_untrained_network_changes_nothing() -> None:
    assert Verdict().after(0, {records.KNN: 30.0}, bounds=BOUNDS) == Verdict()


# ------------------------------------------------------------------------------------------------ evidence, policy


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (UNIFORM, ["teacher entropy / ln K 0.999 >= 0.99", "KL / ln K 0.001 <= 0.02"]),
        (ONE_PROTOTYPE, ["entropy of the mean target / ln K 0.001 <= 0.02", "KL / ln K 0.0005 <= 0.02"]),
        (FEW_PROTOTYPES, ["perplexity of the mean target 2.014 <= 3"]),
        (SAME, ["mutual information / ln K 0.005 <= 0.01"]),
        (HEALTHY, []),
    ],
)
def test_a_sign_comes_with_what_crossed_which_bound(state: State, told: list[str]) -> None:
    sign = Verdict().sign(values(state), bounds=BOUNDS)
    assert [str(crossed) for crossed in sign.evidence] == told


@pytest.mark.parametrize(
    ("knobs", "verdict", "stops"),
    [
        ({"policy": "stop", "after_steps": 50}, Verdict("uniform", 180, first_sign=("constant", 150)), True),
        ({"policy": "stop", "after_steps": 51}, Verdict("uniform", 180, first_sign=("constant", 150)), False),
        ({"policy": "stop", "after_steps": 0}, Verdict("none", first_sign=("uniform", 190)), False),
        ({"policy": "stop", "after_steps": 0}, Verdict("not_started", 10, first_sign=("uniform", 10)), False),
        ({"policy": "record", "after_steps": 0}, Verdict("uniform", 150, first_sign=("uniform", 150)), False),
    ],
)
def test_only_a_collapse_that_has_lasted_ends_a_trial_and_only_if_asked(
    knobs: dict[str, Any], verdict: Verdict, stops: bool
) -> None:
    assert Collapse(**knobs).stops(200, verdict) is stops


def test_a_collapse_that_changes_its_name_all_the_time_ends_a_trial_too() -> None:
    bounds = Collapse(certain_steps=40, policy="stop", after_steps=100)
    seen = verdicts([HEALTHY] * 3 + [FEW_PROTOTYPES, ONE_PROTOTYPE] * 6, bounds=bounds)
    assert [bounds.stops(10 * i, verdict) for i, verdict in enumerate(seen, start=1)] == [False] * 13 + [True] * 2


# ----------------------------------------------------------------------------- outputs that are no distributions


def verdicts_on_outputs(stds: Iterable[float | None], *, bounds: Collapse = BOUNDS) -> list[Verdict]:
    """After each record, ten steps apart, of a method without targets; None is a method without outputs too."""
    return verdicts(
        ({records.LOSS: 0.0} if std is None else {records.LOSS: 0.0, records.OUTPUT_STD: std} for std in stds),
        bounds=bounds,
    )


def test_equal_outputs_are_called_constant_once_certain_and_dated_to_their_first_record() -> None:
    seen = verdicts_on_outputs([0.9] * 3 + [0.001] * 8)
    assert [verdict.kind for verdict in seen] == ["none"] * 7 + ["constant"] * 4
    assert [verdict.onset_step for verdict in seen] == [None] * 7 + [40] * 4


@pytest.mark.parametrize(("std", "kind"), [(0.0, "constant"), (0.09, "constant"), (0.11, "none"), (1.0, "none")])
def test_the_bound_of_constant_outputs_is_the_knobs(std: float, kind: str) -> None:
    assert verdicts_on_outputs([0.5] + [std] * 8)[-1].kind == kind
    assert verdicts_on_outputs([0.5] + [std / 10] * 8, bounds=Collapse(constant_std=0.01))[-1].kind == kind


@pytest.mark.parametrize("std", [None, math.nan])
def test_a_method_without_outputs_or_with_a_single_one_is_called_none(std: float | None) -> None:
    """A deviation over a single image is not a number."""
    assert {verdict.kind for verdict in verdicts_on_outputs([std] * 50)} == {"none"}


@pytest.mark.parametrize(("state", "kind"), [(HEALTHY, "none"), (UNIFORM, "uniform"), (ONE_PROTOTYPE, "one_prototype")])
def test_where_there_are_targets_they_are_judged_and_not_the_outputs(state: State, kind: str) -> None:
    shown = [values(HEALTHY) | {records.OUTPUT_STD: 0.9}] + [values(state) | {records.OUTPUT_STD: 0.0}] * 2
    assert verdicts(shown, bounds=Collapse(certain_steps=0))[-1].kind == kind
