"""Studies: what is asked, what Optuna is told of it, and what is left after a driver was killed."""

import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from dino_lab.ablation import Ablation, Axis, LabelledTrial
from dino_lab.core.records import KNN, PEAK_MEMORY, TRAIN_MINUTES, Record
from dino_lab.core.trial import Trial
from dino_lab.orchestration.folder import TrialFolder
from dino_lab.orchestration.search import STUDIES, Study
from dino_lab.space import Between, OneOf, Search

ROOT = Path(__file__).parents[2]
LR, TEMP, WARMUP = "optimizer.lr", "method.loss.teacher_temp", "method.loss.warmup_teacher_temp"
KIND, MOMENTUM = "method.operation.kind", "method.operation.center_momentum"
SPACE: dict[Any, Any] = {LR: Between(1e-3, 1e-1, log=True), (TEMP, WARMUP): Between(0.02, 0.08)}
CONDITIONAL: dict[Any, Any] = SPACE | {
    "operation": OneOf({"centering": {MOMENTUM: Between(0.5, 0.99)}, "none": {KIND: "none"}})
}
POINTS = {"batch_size": OneOf([4, 8]), "epochs": Between(2, 4)}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody cuts the power here: that every line is on the disk at once would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return tmp_path / "lab"


def study(
    lab: Path, space: dict[Any, Any] = SPACE, *, overrides: dict[str, Any] | None = None, **options: Any
) -> Study:
    from experiments.baselines import BASELINES

    search = Search(space, **{"trials": 10, **options})
    opened = Study(lab, search, name="quick", baseline_name="smoke", baseline=BASELINES["smoke"], overrides=overrides)
    opened.begin()
    return opened


def told(lab: Path) -> list[FrozenTrial]:
    """What the newest study in the file holds, read by Optuna alone."""
    storage = JournalStorage(JournalFileBackend(str(lab / STUDIES)))
    return optuna.load_study(study_name=optuna.get_all_study_names(storage)[-1], storage=storage).trials


def ended(lab: Path, trial: Trial, state: str, *courses: dict[str, float], error: str | None = None) -> str:
    """A trial's folder as a worker leaves it: step 0, then a record for each of the others; returns the id."""
    folder = TrialFolder(lab, trial.identity)
    folder.begin(trial)
    verdict = ("uniform", 3) if state == "stopped" else ("none", None)
    for step, values in enumerate([{KNN: 33.0}, *courses]):
        folder.append(Record(4 * step, float(step), 1e9 + step, values, *verdict))
    folder.write_end(state, error, seconds=1.0)
    return trial.identity


def finish(lab: Path, opened: Study, number: int = 1000) -> list[LabelledTrial]:
    """Runs what is asked for, up to so many: the best learning rate is 0.01."""
    asked = list(itertools.islice(iter(opened.ask, None), number))
    for each in asked:
        opened.tell(ended(lab, each.trial, "finished", {KNN: 90 - 1000 * abs(each.trial.optimizer.lr - 0.01)}))
    return asked


# ------------------------------------------------------------------------------------------------------------ asking


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
@pytest.mark.parametrize("space", [SPACE, CONDITIONAL], ids=["flat", "conditional"])
def test_every_sampler_asks_for_as_many_trials_as_it_may(sampler: str, space: dict[Any, Any], lab: Path) -> None:
    opened = study(lab, space, sampler=sampler, trials=12)
    asked = finish(lab, opened)
    assert len({each.trial.identity for each in asked}) == 12
    assert opened.spent == "12 of 12 trials"
    assert [trial.state.name for trial in told(lab)] == ["COMPLETE"] * 12
    for each, trial in zip(asked, told(lab), strict=True):
        assert each.row.startswith(f"#{trial.number} lr=")
        assert trial.user_attrs["row"] == each.row
        assert trial.user_attrs["trial_id"] == each.trial.identity
        assert trial.params[LR] == each.trial.optimizer.lr == each.changes[LR]
        assert trial.value == 90 - 1000 * abs(trial.params[LR] - 0.01)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "gp"])
def test_several_objectives_have_each_their_direction(sampler: str, lab: Path) -> None:
    opened = study(lab, sampler=sampler, objectives=[KNN, TRAIN_MINUTES], trials=12)
    while each := opened.ask():
        assert not opened.report(each.trial.identity, Record(4, 1.0, 1.0, {KNN: 5.0}))
        opened.tell(ended(lab, each.trial, "finished", {KNN: 50.0, TRAIN_MINUTES: 0.5}))
    assert [trial.values for trial in told(lab)] == [[50.0, 0.5]] * 12
    storage = JournalStorage(JournalFileBackend(str(lab / STUDIES)))
    assert [d.name for d in optuna.load_study(study_name=opened.name, storage=storage).directions] == [
        "MAXIMIZE",
        "MINIMIZE",
    ]


def test_a_grid_covers_every_point_once_also_over_sessions(lab: Path) -> None:
    first = finish(lab, study(lab, POINTS, sampler="grid", trials=None), number=4)
    second = study(lab, POINTS, sampler="grid", trials=None)
    points = [(each.trial.batch_size, each.trial.epochs) for each in [*first, *finish(lab, second)]]
    assert sorted(points) == list(itertools.product([4, 8], [2, 3, 4]))
    assert second.ask() is None
    assert second.spent == "6 of 6 trials"


def test_a_grid_after_another_sampler_covers_every_point_too(lab: Path) -> None:
    before = finish(lab, study(lab, POINTS, sampler="random", trials=3))
    after = finish(lab, study(lab, POINTS, sampler="grid", trials=None))
    assert len({each.trial.identity for each in [*before, *after]}) == len(before) + len(after) == 6
    assert len(told(lab)) == 6


def test_a_grid_asks_for_no_more_trials_than_it_is_said(lab: Path) -> None:
    assert len(finish(lab, study(lab, POINTS, sampler="grid", trials=4))) == 4


def test_all_points_of_a_grid_may_run_at_the_same_time(lab: Path) -> None:
    opened = study(lab, POINTS, sampler="grid", trials=None)
    assert len({each.trial.identity for each in iter(opened.ask, None)}) == 6


def test_knobs_of_a_level_are_suggested_only_where_it_is_chosen(lab: Path) -> None:
    finish(lab, study(lab, CONDITIONAL, trials=20))
    for trial in told(lab):
        assert (f"{MOMENTUM} (centering)" in trial.params) == (trial.params["operation"] == "centering")
    assert {trial.params["operation"] for trial in told(lab)} == {"centering", "none"}


def test_a_second_session_goes_on_and_does_not_suggest_the_same_again(lab: Path) -> None:
    first = finish(lab, study(lab, sampler="random"), number=3)
    second = finish(lab, study(lab, sampler="random"))
    assert (len(first), len(second)) == (3, 7)
    assert len({each.trial.optimizer.lr for each in [*first, *second]}) == 10
    other = finish(lab.with_name("other"), study(lab.with_name("other"), sampler="random"), number=3)
    assert [each.trial for each in other] == [each.trial for each in first]


def test_hours_are_those_of_all_sessions_together(lab: Path) -> None:
    def stored() -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(lab / STUDIES)))
        return optuna.load_study(study_name=optuna.get_all_study_names(storage)[-1], storage=storage)

    assert study(lab, trials=None, hours=1.0).ask()
    first = stored().user_attrs["seconds"]
    opened = study(lab, trials=None, hours=1.0)
    assert opened.ask().row_index == 0
    assert opened.ask().row_index == 1
    assert stored().user_attrs["seconds"] > first > 0
    assert stored().user_attrs["seconds"] < 60
    stored().set_user_attr("seconds", 3600.0)
    late = study(lab, trials=None, hours=1.0)
    # What was left running is asked for, whatever the time.
    assert [late.ask().row_index, late.ask().row_index] == [0, 1]
    assert late.ask() is None
    assert late.spent == "1.00 of 1 hours"
    assert not study(lab, trials=None, hours=1.5).spent


# ------------------------------------------------------------------------------------------------ what was done before


def test_what_is_suggested_again_takes_its_result_and_is_not_run_twice(lab: Path) -> None:
    opened = study(lab, {"batch_size": OneOf([4, 8])}, sampler="random", trials=12)
    ran = []
    while each := opened.ask():
        ran.append(each.trial.batch_size)
        opened.tell(ended(lab, each.trial, "finished", {KNN: 10.0 * each.trial.batch_size}))
    assert sorted(ran) == [4, 8]
    trials = told(lab)
    assert len(trials) == 12
    assert all(trial.value == 10.0 * trial.params["batch_size"] for trial in trials)
    assert all(trial.intermediate_values == {4: trial.value} for trial in trials)
    assert len({each.row for each in opened.labelled()}) == 12
    assert [each.row_index for each in opened.labelled(9)] == [9, 10, 11]
    assert len({each.trial.identity for each in opened.labelled()}) == 2


def test_a_space_without_anything_new_is_exhausted(lab: Path) -> None:
    opened = study(lab, {"batch_size": OneOf([4, 8])}, trials=None, hours=100.0)
    assert len(finish(lab, opened)) == 2
    assert opened.spent == "the last 50 suggestions were refused or known"


def test_what_is_suggested_while_it_runs_is_told_with_it(lab: Path) -> None:
    opened = study(lab, {"batch_size": OneOf([4, 8])}, sampler="random", trials=12)
    running = list(iter(opened.ask, None))
    assert len(running) == 2
    for each in running:
        opened.tell(ended(lab, each.trial, "finished", {KNN: 10.0 * each.trial.batch_size}))
    assert [trial.value for trial in told(lab)] == [10.0 * trial.params["batch_size"] for trial in told(lab)]
    again = study(lab, {"batch_size": OneOf([4, 8])}, sampler="random", trials=12)
    assert again.ask() is None


def test_running_twins_are_handed_out_once_by_the_next_session(lab: Path) -> None:
    opened = study(lab, {"batch_size": OneOf([4, 8])}, sampler="random", trials=12)
    assert len(list(iter(opened.ask, None))) == 2
    again = study(lab, {"batch_size": OneOf([4, 8])}, sampler="random", trials=12)
    assert len(finish(lab, again)) == 2
    assert {trial.state.name for trial in told(lab)} == {"COMPLETE"}


def test_finished_trials_of_other_experiments_seed_the_study_once(lab: Path, smoke: Trial) -> None:
    axis = Axis("temps", {str(t): {TEMP: t, WARMUP: t, LR: 0.01} for t in (0.04, 0.06, 0.1)})
    for each in Ablation.grid([axis], seeds=[0, 1]).trials(smoke):
        ended(lab, each.trial, "finished", {KNN: 20.0}, {KNN: 1000 * each.trial.method.loss.teacher_temp})
    inside = smoke.but({TEMP: 0.05, WARMUP: 0.05})
    assert 1e-3 < inside.optimizer.lr < 1e-1
    ended(lab, inside.but({"epochs": 5}), "finished", {KNN: 1.0})  # another knob
    ended(lab, inside.but({WARMUP: 0.06}), "finished", {KNN: 2.0})  # knobs that take one value in the space
    ended(lab, inside.but({LR: 0.5}), "finished", {KNN: 3.0})  # outside
    ended(lab, inside.but({LR: 0.02}), "failed", {KNN: 4.0}, error="gone")
    ended(lab, inside.but({LR: 0.03}), "finished", {TRAIN_MINUTES: 5.0})  # without the objective
    TrialFolder(lab, inside.but({LR: 0.04}).identity).begin(inside.but({LR: 0.04}))  # running

    opened = study(lab, trials=2)
    seeds = told(lab)
    assert {trial.params[TEMP]: trial.value for trial in seeds} == {0.04: 40.0, 0.06: 60.0}
    assert all(trial.user_attrs["seeded"] and trial.state.name == "COMPLETE" for trial in seeds)
    assert [trial.intermediate_values for trial in seeds] == [{4: 20.0, 8: trial.value} for trial in seeds]
    assert {each.trial.method.loss.teacher_temp: each.trial.collapse.policy for each in opened.labelled()} == {
        0.04: "record",
        0.06: "record",
    }
    # They cost none of the budget, and come once.
    assert len(finish(lab, opened)) == 2
    study(lab, trials=2)
    assert len(told(lab)) == 4
    assert json.loads(opened.tags_of(opened.labelled()[0])["dino_lab.seeded"]) is True


@pytest.mark.parametrize("left", ["", '{"data": {"ki', None])
def test_a_trial_whose_settings_are_damaged_or_gone_seeds_nothing_and_stops_no_search(
    left: str | None, lab: Path, smoke: Trial
) -> None:
    inside = smoke.but({TEMP: 0.05, WARMUP: 0.05, LR: 0.02})
    settings = lab / "trials" / ended(lab, inside, "finished", {KNN: 50.0}) / "trial.json"
    settings.unlink()
    if left is not None:
        settings.write_text(left)
    assert len(finish(lab, study(lab, trials=2))) == 2
    assert len(told(lab)) == 2


def test_a_trial_that_ran_through_without_collapse_is_the_result_of_its_suggestion(lab: Path, smoke: Trial) -> None:
    through = smoke.but({"batch_size": 4, "epochs": 3})
    ended(lab, through, "finished", {KNN: 77.0})
    opened = study(lab, POINTS, sampler="grid", trials=None)
    asked = finish(lab, opened)
    assert len(asked) == 5
    (taken,) = [trial for trial in told(lab) if trial.params == {"batch_size": 4, "epochs": 3}]
    assert (taken.value, taken.user_attrs["trial_id"]) == (77.0, through.identity)
    assert "seeded" not in taken.user_attrs
    assert through in [each.trial for each in opened.labelled()]


def test_another_space_is_another_study_and_takes_over_what_fits(lab: Path) -> None:
    first = study(lab, trials=6)
    old = finish(lab, first)
    _, _, low, *_ = sorted(each.trial.optimizer.lr for each in old)
    narrow = {LR: Between(low, 1e-1, log=True), (TEMP, WARMUP): Between(0.02, 0.08)}
    second = study(lab, narrow, trials=6)
    assert second.name != first.name
    kept = [each.trial.identity for each in old if each.trial.optimizer.lr >= low]
    assert sorted(trial.user_attrs["trial_id"] for trial in told(lab)) == sorted(kept)
    assert len(kept) == 4


def test_the_name_of_a_study_says_what_is_searched_and_a_longer_budget_is_the_same_study(lab: Path) -> None:
    one = study(lab, overrides={"epochs": 4, "precision": "bf16"})
    assert one.name.startswith('quick smoke epochs=4 precision="bf16" ')
    assert study(lab, overrides={"epochs": 4, "precision": "bf16"}, trials=50, sampler="random").name == one.name
    others = [
        study(lab),
        study(lab, overrides={"epochs": 4, "precision": "bf16"}, fixed={"batch_size": 4}),
        study(lab, overrides={"epochs": 4, "precision": "bf16"}, objectives=[TRAIN_MINUTES]),
        study(lab, overrides={"epochs": 4, "precision": "bf16"}, seed=1),
    ]
    assert len({one.name, *(other.name for other in others)}) == 5


def test_what_is_known_of_the_data_becomes_part_of_every_trial(lab: Path, smoke: Trial) -> None:
    search = Search(SPACE, trials=2)
    opened = Study(
        lab,
        search,
        name="quick",
        baseline_name="smoke",
        baseline=smoke,
        prepare=lambda trial: trial.but({"data.draw_seed": 7}),
    )
    opened.begin()
    each = opened.ask()
    assert each.trial.data.draw_seed == 7
    assert TrialFolder(lab, opened.labelled()[0].trial.identity).path == TrialFolder(lab, each.trial.identity).path
    assert opened.name != study(lab, trials=2).name


# ----------------------------------------------------------------------------------------------------------- telling


def outcome(lab: Path, opened: Study, state: str, *courses: dict[str, float], error: str | None = None) -> FrozenTrial:
    each = opened.ask()
    opened.tell(ended(lab, each.trial, state, *courses, error=error))
    return told(lab)[-1]


def test_a_finished_trial_is_told_with_its_last_value(lab: Path) -> None:
    trial = outcome(lab, study(lab), "finished", {KNN: 80.0}, {KNN: 60.0}, {TRAIN_MINUTES: 1.0})
    assert (trial.state.name, trial.value) == ("COMPLETE", 60.0)
    assert trial.user_attrs["verdict"] == "none"
    assert trial.user_attrs["state"] == "finished"


def test_a_pruned_trial_and_a_failed_one_are_told_as_such(lab: Path) -> None:
    opened = study(lab)
    pruned = outcome(lab, opened, "pruned", {KNN: 40.0})
    assert (pruned.state.name, pruned.value, pruned.user_attrs["state"]) == ("PRUNED", 40.0, "pruned")
    failed = outcome(lab, opened, "failed", {KNN: 40.0}, error="MemoryError: no memory")
    assert (failed.state.name, failed.value) == ("FAIL", None)
    assert failed.user_attrs["error"] == "MemoryError: no memory"


def test_a_collapse_has_the_value_that_was_measured_when_it_was_stopped(lab: Path) -> None:
    trial = outcome(lab, study(lab), "stopped", {KNN: 70.0}, {KNN: 21.0})
    assert (trial.state.name, trial.value) == ("COMPLETE", 21.0)
    assert (trial.user_attrs["verdict"], trial.user_attrs["onset_step"]) == ("uniform", 3)


def test_a_collapse_without_a_value_has_the_worst(lab: Path) -> None:
    # Step 0 is of the untrained network.
    assert outcome(lab, study(lab), "stopped").value == 0.0


def test_what_diverged_has_the_worst_value_however_good_it_was_before(lab: Path) -> None:
    trial = outcome(lab, study(lab), "diverged", {KNN: 95.0}, {}, error="diverged at step 8")
    assert (trial.state.name, trial.value) == ("COMPLETE", 0.0)
    assert trial.user_attrs["error"] == "diverged at step 8"


def test_a_collapse_is_no_bargain(lab: Path) -> None:
    opened = study(lab, objectives=[KNN, TRAIN_MINUTES, PEAK_MEMORY])
    whole = {KNN: 80.0, TRAIN_MINUTES: 3.0, PEAK_MEMORY: 500.0}
    assert outcome(lab, opened, "finished", whole).values == [80.0, 3.0, 500.0]
    assert outcome(lab, opened, "finished", whole | {TRAIN_MINUTES: 1.0}).values == [80.0, 1.0, 500.0]
    quick = {KNN: 20.0, TRAIN_MINUTES: 0.1, PEAK_MEMORY: 900.0}
    assert outcome(lab, opened, "stopped", quick).values == [20.0, 3.0, 900.0]
    assert outcome(lab, opened, "diverged", quick).values == [0.0, 3.0, 900.0]


def test_what_diverged_before_anything_had_a_cost_is_told_why_it_has_none(lab: Path) -> None:
    trial = outcome(lab, study(lab, objectives=[KNN, TRAIN_MINUTES]), "diverged", {})
    assert trial.state.name == "FAIL"
    assert trial.user_attrs["error"] == "diverged without a value of runtime/train_minutes"


@pytest.mark.parametrize("values", [{}, {KNN: float("nan")}, {KNN: float("inf")}])
def test_a_finished_trial_without_the_objective_has_failed_and_nan_is_none(values: dict[str, float], lab: Path) -> None:
    trial = outcome(lab, study(lab), "finished", {TRAIN_MINUTES: 1.0}, values)
    assert (trial.state.name, trial.value, trial.intermediate_values) == ("FAIL", None, {})
    assert trial.user_attrs["error"] == "finished without a value of eval/knn_top1"


def test_telling_twice_or_before_the_end_does_nothing(lab: Path) -> None:
    opened = study(lab)
    each = opened.ask()
    opened.tell(each.trial.identity)
    assert told(lab)[0].state.name == "RUNNING"
    ended(lab, each.trial, "finished", {KNN: 50.0})
    opened.tell(each.trial.identity)
    before = told(lab)
    opened.tell(each.trial.identity)
    assert told(lab) == before
    assert opened.tags_of(each)["dino_lab.search_state"] == "COMPLETE"


def test_settings_that_are_refused_have_failed_with_the_reason(lab: Path) -> None:
    space = {"optimizer.warmup_epochs": Between(0.0, 6.0)}
    opened = study(lab, space, sampler="random", trials=20)
    assert opened.name.startswith("quick smoke ")
    ran = finish(lab, opened)
    assert 0 < len(ran) < 20
    assert all(each.trial.optimizer.warmup_epochs <= 3 for each in ran)
    refused = [trial for trial in told(lab) if trial.state.name == "FAIL"]
    assert len(refused) == 20 - len(ran)
    assert all("exceeds epochs = 3" in trial.user_attrs["refused"] for trial in refused)
    said = json.loads(opened.tags()["dino_lab.refused"])
    assert said["number"] == len(refused)
    assert said["first"][0]["error"] == refused[0].user_attrs["refused"]
    assert len(opened.labelled()) == len(ran)


# ----------------------------------------------------------------------------------------------------------- pruning


def course(knn: float, *, at: int, of: int = 3, verdict: str = "none") -> Record:
    """An evaluation after this epoch; smoke has three of four steps each."""
    return Record(4 * at, float(at), 1.0, {KNN: knn}, verdict, None)


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_what_is_worse_than_others_at_the_same_step_is_pruned(pruner: str, lab: Path) -> None:
    opened = study(lab, pruner=pruner, trials=20)
    for i in range(8):
        each = opened.ask()
        opened.report(each.trial.identity, course(50.0 + i, at=1))
        opened.tell(ended(lab, each.trial, "finished", {KNN: 50.0 + i}, {KNN: 60.0 + i}))
    bad, good = opened.ask(), opened.ask()
    assert opened.report(bad.trial.identity, course(10.0, at=1))
    assert not opened.report(good.trial.identity, course(99.0, at=1))
    assert told(lab)[bad.row_index].intermediate_values == {4: 10.0}
    # Again, as after a resume.
    opened.report(bad.trial.identity, course(10.0, at=1))
    assert told(lab)[bad.row_index].intermediate_values == {4: 10.0}


def test_without_a_pruner_nothing_is_pruned_and_everything_kept(lab: Path) -> None:
    opened = study(lab)
    for value in (90.0, 80.0, 1.0):
        each = opened.ask()
        assert not opened.report(each.trial.identity, course(value, at=1))
        assert told(lab)[-1].intermediate_values == {4: value}


def test_pruning_tells_a_collapse_and_an_end_apart_from_being_worse(lab: Path) -> None:
    opened = study(lab, pruner="median", trials=20)
    for i in range(6):
        each = opened.ask()
        opened.tell(ended(lab, each.trial, "finished", *[{KNN: 50.0 + i}] * 3))
    each = opened.ask()
    assert not opened.report(each.trial.identity, course(10.0, at=0))  # the untrained network
    assert not opened.report(each.trial.identity, course(10.0, at=2, verdict="uniform"))  # is about to be stopped
    assert not opened.report(each.trial.identity, course(10.0, at=3))  # has ended
    other = opened.ask()
    assert not opened.report(other.trial.identity, Record(4, 1.0, 1.0, {TRAIN_MINUTES: 1.0}))
    assert opened.report(other.trial.identity, course(10.0, at=2))


def test_a_collapse_that_is_only_recorded_is_pruned_like_everything_else(lab: Path) -> None:
    opened = study(lab, pruner="median", trials=20, fixed={"collapse.policy": "record"})
    for i in range(6):
        each = opened.ask()
        opened.tell(ended(lab, each.trial, "finished", *[{KNN: 50.0 + i}] * 3))
    assert opened.report(opened.ask().trial.identity, course(10.0, at=2, verdict="uniform"))


def test_asha_judges_first_at_the_first_evaluation(lab: Path) -> None:
    opened = study(lab, pruner="asha", trials=40)

    def judged(knn: float, step: int = 400) -> bool:
        """A whole trial is 1,200 steps."""
        each = opened.ask()
        is_worse = opened.report(each.trial.identity, Record(step, step / 400, 1.0, {KNN: knn}))
        opened.tell(ended(lab, each.trial, "pruned" if is_worse else "finished", {KNN: knn}))
        return is_worse

    # The first is the best of one; nobody can tell yet how many in four it will be.
    assert [judged(65.0 - i) for i in range(16)] == [False] + [True] * 15
    # One in four goes on; a rung before the evaluation, at which there is only the best, would let it go.
    assert not judged(62.5)
    assert judged(60.0)
    each = opened.ask()
    assert not opened.report(each.trial.identity, Record(400, 1.0, 1.0, {KNN: 70.0}))
    # The next rung is at four times the step.
    assert not opened.report(each.trial.identity, Record(800, 2.0, 1.0, {KNN: 1.0}))


# ------------------------------------------------------------------------------------------- killed, and taken up again

DRIVER = """
import os, signal, sys
from pathlib import Path
from tests.orchestration.test_search import ended, study, KNN
lab, kill = Path(sys.argv[1]), sys.argv[2]
opened = study(lab)
for _ in range(2):
    opened.tell(ended(lab, opened.ask().trial, "finished", {KNN: 50.0}))
each, other = opened.ask(), opened.ask()
if kill == "between end and tell":
    ended(lab, each.trial, "stopped", {KNN: 12.0})
opened.report(other.trial.identity, __import__("dino_lab.core.records").core.records.Record(4, 1.0, 1.0, {KNN: 5.0}))
print(each.trial.identity, other.trial.identity, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(lab: Path, how: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", DRIVER, str(lab), how], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


def test_what_a_killed_driver_left_running_comes_first_with_its_number(lab: Path) -> None:
    left = killed(lab, "between ask and tell")
    assert [trial.state.name for trial in told(lab)] == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    opened = study(lab)
    asked = [opened.ask(), opened.ask()]
    assert [each.trial.identity for each in asked] == left
    assert [each.row_index for each in asked] == [2, 3]
    # The resumed trial reports its step again, and ends.
    assert not opened.report(left[1], Record(4, 1.0, 1.0, {KNN: 5.0}))
    for each in asked:
        opened.tell(ended(lab, each.trial, "finished", {KNN: 60.0}))
    assert [trial.value for trial in told(lab)] == [50.0, 50.0, 60.0, 60.0]
    assert len(finish(lab, opened)) == 6


def test_an_end_that_a_killed_driver_did_not_tell_is_told(lab: Path) -> None:
    stopped, running = killed(lab, "between end and tell")
    opened = study(lab)
    assert [trial.state.name for trial in told(lab)] == ["COMPLETE", "COMPLETE", "COMPLETE", "RUNNING"]
    assert (told(lab)[2].value, told(lab)[2].user_attrs["trial_id"]) == (12.0, stopped)
    assert opened.ask().trial.identity == running


def test_a_suggestion_that_was_cut_short_is_completed(lab: Path) -> None:
    opened = study(lab, CONDITIONAL)
    storage = JournalStorage(JournalFileBackend(str(lab / STUDIES)))
    begun = optuna.load_study(study_name=opened.name, storage=storage).ask()
    rate = begun.suggest_float(LR, 1e-3, 1e-1, log=True)
    each = study(lab, CONDITIONAL).ask()
    assert (each.row_index, each.trial.optimizer.lr) == (0, rate)
    assert set(told(lab)[0].params) >= {LR, TEMP, "operation"}
    assert len(told(lab)) == 1


@pytest.mark.parametrize("again", [SPACE, CONDITIONAL], ids=["the same study", "another study"])
def test_a_line_that_was_cut_short_spoils_nothing(again: dict[Any, Any], lab: Path) -> None:
    finish(lab, study(lab), number=2)
    with (lab / STUDIES).open("a") as journal:
        journal.write('{"op_code":4,"worker_id":"x","study')
    assert len(finish(lab, study(lab, again), number=2)) == 2
    # The other study has taken over what the first one had, of which nothing is lost.
    assert [trial.state.name for trial in told(lab)] == ["COMPLETE"] * 4


@pytest.mark.parametrize("line", ["nonsense\n", '{"not": "Optuna\'s"}\n', "\x80\n"])
def test_a_journal_that_is_spoiled_is_told_and_nothing_is_lost_without_it(line: str, lab: Path) -> None:
    finish(lab, study(lab), number=3)
    whole = (lab / STUDIES).read_bytes()
    (lab / STUDIES).write_bytes(whole + line.encode("latin-1") + whole)
    with pytest.raises(ValueError, match=r"optuna\.log: cannot be read .* move it away, and searches begin again"):
        study(lab)
    (lab / STUDIES).unlink()
    study(lab)
    assert [trial.state.name for trial in told(lab)] == ["COMPLETE"] * 3


def test_looking_at_a_study_changes_nothing(lab: Path, smoke: Trial) -> None:
    opened = study(lab)
    finish(lab, opened, number=2)
    ended(lab, opened.ask().trial, "stopped", {KNN: 12.0})
    opened.ask()
    before = (lab / STUDIES).read_bytes()
    looked = Study(lab, Search(SPACE, trials=10), name="quick", baseline_name="smoke", baseline=smoke)
    assert len(looked.labelled()) == 4
    assert [json.loads(looked.tags_of(each)["dino_lab.suggested"])[LR] for each in looked.labelled()] == [
        trial.params[LR] for trial in told(lab)
    ]
    assert looked.spent == ""
    assert (lab / STUDIES).read_bytes() == before


# ------------------------------------------------------------------------------------------------------- what is said


def test_tags_describe_the_space_as_optuna_reads_it_again(lab: Path) -> None:
    opened = study(lab, CONDITIONAL, objectives=[KNN], pruner="asha", fixed={"batch_size": 4})
    finish(lab, opened)
    tags = opened.tags()
    space = {
        name: optuna.distributions.json_to_distribution(json.dumps(each))
        for name, each in json.loads(tags["dino_lab.space"]).items()
    }
    assert list(space) == [LR, TEMP, "operation", f"{MOMENTUM} (centering)"]
    for trial in told(lab):
        assert trial.distributions == {name: space[name] for name in trial.params}
    assert json.loads(tags["dino_lab.objectives"]) == [KNN]
    assert json.loads(tags["dino_lab.fixed"]) == {"batch_size": 4}
    assert json.loads(tags["dino_lab.search"]) == {
        "sampler": "tpe",
        "pruner": "asha",
        "seed": 0,
        "trials": 10,
        "hours": None,
    }
    assert tags["dino_lab.study"] == opened.name
    for each in opened.labelled():
        own = opened.tags_of(each)
        assert json.loads(own["dino_lab.changes"]) == each.changes
        assert json.loads(own["dino_lab.told"]) == told(lab)[each.row_index].values
        assert own["dino_lab.search_state"] == "COMPLETE"


def test_optuna_says_nothing_of_its_own(lab: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sampler in ("tpe", "gp", "nsga2", "random"):
            finish(lab, study(lab, CONDITIONAL, sampler=sampler, trials=12, seed=1))
        finish(lab, study(lab, POINTS, sampler="grid"))
    assert capfd.readouterr() == ("", "")


def test_the_dashboard_shows_every_study_of_the_lab(lab: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    finish(lab, study(lab), number=2)
    study(lab, CONDITIONAL)
    application = dashboard.wsgi(JournalStorage(JournalFileBackend(str(lab / STUDIES))))
    said: list[str] = []
    environment = {
        "PATH_INFO": "/api/studies",
        "REQUEST_METHOD": "GET",
        "wsgi.input": None,
        "HTTP_ACCEPT": "application/json",
    }
    body: Iterator[bytes] = application(environment, lambda status, headers, *_: said.append(status))
    assert json.loads(b"".join(body))["study_summaries"][0]["study_name"].startswith("quick smoke ")
    assert said == ["200 OK"]
