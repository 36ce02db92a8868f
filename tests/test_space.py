"""Searches: what a space suggests, what that sets, and which spaces are refused."""

from typing import Any

import pytest
from optuna.distributions import IntDistribution
from optuna.trial import FixedTrial

from dino_lab.ablation import Like
from dino_lab.core.records import KNN, PEAK_MEMORY, TRAIN_MINUTES
from dino_lab.core.settings import KnobError
from dino_lab.core.trial import Trial
from dino_lab.space import Between, OneOf, Search

LR, TEMP, WARMUP = "optimizer.lr", "method.loss.teacher_temp", "method.loss.warmup_teacher_temp"
OUT_DIM, KIND, MOMENTUM = "method.head.out_dim", "method.operation.kind", "method.operation.center_momentum"
OPERATION = OneOf(
    {
        "centering": {KIND: "centering", MOMENTUM: Between(0.5, 0.99)},
        "none": {KIND: "none"},
    }
)
SPACE: dict[Any, Any] = {
    LR: Between(1e-4, 0.1, log=True),
    (TEMP, WARMUP): Between(0.02, 0.08, step=0.02),
    OUT_DIM: OneOf([64, 128]),
    "operation": OPERATION,
}
CENTERED = {LR: 0.01, TEMP: 0.06, OUT_DIM: 64, "operation": "centering", f"{MOMENTUM} (centering)": 0.9}


def search(space: dict[Any, Any] = SPACE, **options: Any) -> Search:
    return Search(space, **{"trials": 10, **options})


# ------------------------------------------------------------------------------------------------ what is suggested


def test_a_suggestion_sets_knobs_those_of_a_level_and_all_that_take_one_value(smoke: Trial) -> None:
    made = search().labelled(FixedTrial(CENTERED, number=12), smoke)
    assert made.changes == {LR: 0.01, TEMP: 0.06, WARMUP: 0.06, OUT_DIM: 64, KIND: "centering", MOMENTUM: 0.9}
    assert made.trial == smoke.but(made.changes)
    assert (made.row_index, made.seed) == (12, 0)


def test_knobs_of_a_level_are_suggested_only_where_it_is_chosen(smoke: Trial) -> None:
    without = FixedTrial({LR: 0.01, TEMP: 0.06, OUT_DIM: 64, "operation": "none"})
    assert search().changes(without, smoke)[KIND] == "none"
    assert MOMENTUM not in search().changes(without, smoke)


def test_everything_that_is_ever_suggested_has_a_name() -> None:
    assert list(search().distributions) == [LR, TEMP, OUT_DIM, "operation", f"{MOMENTUM} (centering)"]
    assert search().is_conditional
    assert not search({LR: Between(0.1, 0.2)}).is_conditional


def test_levels_may_search_the_same_knob_each_in_its_way_and_have_levels_themselves(smoke: Trial) -> None:
    nested = {
        "optimizer": OneOf(
            {
                "adamw": {LR: Between(0.001, 0.01)},
                "sgd": {
                    "optimizer.kind": "sgd",
                    LR: Between(0.1, 1.0),
                    "decay": OneOf({"off": {"optimizer.weight_decay": 0.0}, "on": {"optimizer.weight_decay": 0.1}}),
                },
            }
        )
    }
    one = search(nested)
    assert list(one.distributions) == ["optimizer", f"{LR} (adamw)", f"{LR} (sgd)", "decay (sgd)"]
    suggested = FixedTrial({"optimizer": "sgd", f"{LR} (sgd)": 0.5, "decay (sgd)": "on"})
    made = one.labelled(suggested, smoke)
    assert made.changes == {"optimizer.kind": "sgd", LR: 0.5, "optimizer.weight_decay": 0.1}
    assert made.row == "#0 optimizer=sgd lr=0.5 decay=on"


def test_whole_bounds_suggest_whole_numbers_and_lists_are_suggested_as_text(smoke: Trial) -> None:
    space = {"crops.local_crops_number": Between(0, 8, step=2), "crops.local.scale": OneOf([[0.1, 0.4], [0.2, 0.5]])}
    suggested = FixedTrial({"crops.local_crops_number": 6, "crops.local.scale": "[0.2, 0.5]"})
    made = search(space).labelled(suggested, smoke)
    assert made.trial.crops.local_crops_number == 6
    assert made.trial.crops.local.scale == (0.2, 0.5)
    assert suggested.distributions["crops.local_crops_number"] == IntDistribution(0, 8, step=2)


def test_a_level_may_take_the_baselines_value_of_another_knob(smoke: Trial) -> None:
    space = {
        "length": OneOf({"short": {"epochs": Like("epochs", times=0.5)}, "long": {"epochs": Like("epochs", times=2)}})
    }
    baseline = search(space).start(smoke.but({"epochs": 4, "optimizer.warmup_epochs": 1.0}))
    assert search(space).labelled(FixedTrial({"length": "long"}), baseline).trial.epochs == 8
    assert search(space).readings({"epochs": 2}, baseline) == [{"length": "short"}]


def test_settings_that_do_not_go_together_are_refused_by_their_knobs(smoke: Trial) -> None:
    space = {"optimizer.warmup_epochs": Between(0.0, 50.0)}
    with pytest.raises(KnobError, match=r"optimizer\.warmup_epochs = 49\.0: exceeds epochs = 3"):
        search(space).labelled(FixedTrial({"optimizer.warmup_epochs": 49.0}), smoke)


@pytest.mark.parametrize(
    ("between", "values"),
    [
        (Between(0, 8, step=2), [0, 2, 4, 6, 8]),
        (Between(1, 3), [1, 2, 3]),
        (Between(0.1, 0.4, step=0.1), [0.1, 0.2, 0.3, 0.4]),
        (Between(0.1, 0.4), None),
        (Between(0, 1.0), None),
    ],
)
def test_a_range_with_a_step_or_of_whole_numbers_has_so_many_values(
    between: Between, values: list[float] | None
) -> None:
    assert between.values == values
    assert all(value in between for value in values or [])


@pytest.mark.parametrize("outside", [-2, 10, 3, 2.0, True, "2", None])
def test_what_is_no_value_of_a_range_is_not_in_it(outside: Any) -> None:
    assert outside not in Between(0, 8, step=2)


# ----------------------------------------------------------------------------------------------------- names of rows


def test_a_row_is_called_by_its_number_and_by_what_varies() -> None:
    values = {LR: 0.0123456, TEMP: 0.04, OUT_DIM: 64, "operation": "centering", f"{MOMENTUM} (centering)": 0.987654}
    assert search().row(7, values) == "#7 lr=0.0123 tt=0.04 od=64 operation=centering cm=0.988"
    assert search().row(8, {LR: 0.5, "operation": "none"}) == "#8 lr=0.5 operation=none"


def test_names_that_would_be_the_same_are_longer() -> None:
    space = {
        "method.loss.student_temp": Between(0.1, 0.2),
        "crops.some_thing": Between(0.1, 0.2),
        "method.head.kind": OneOf(["a", "b"]),
        "method.loss.kind": OneOf(["a", "b"]),
        "evals.knn.kind": OneOf([True, None]),
    }
    row = search(space).row(0, dict(zip(search(space).distributions, (0.1, 0.2, "a", "b", True), strict=True)))
    assert row == "#0 student_temp=0.1 some_thing=0.2 head.kind=a loss.kind=b knn.kind=true"


# -------------------------------------------------------------------------------------------------- what is read back


def test_settings_are_read_back_as_the_suggestion_that_made_them(smoke: Trial) -> None:
    one = search()
    for suggestion in (CENTERED, {LR: 0.01, TEMP: 0.06, OUT_DIM: 128, "operation": "none"}):
        made = one.labelled(FixedTrial(suggestion), smoke).trial
        assert one.readings(made.flat(), smoke) == [suggestion]


@pytest.mark.parametrize(
    "changes",
    [{LR: 0.5}, {TEMP: 0.05}, {WARMUP: 0.04}, {OUT_DIM: 32}, {KIND: "sinkhorn"}, {MOMENTUM: 0.2}],
    ids=["above", "between steps", "not the same", "no option", "no level", "outside its level"],
)
def test_settings_outside_of_the_space_have_no_reading(changes: dict[str, Any], smoke: Trial) -> None:
    made = search().labelled(FixedTrial(CENTERED), smoke).trial
    assert search().readings(made.flat(), smoke)
    assert search().readings(made.but(changes).flat(), smoke) == []


def test_levels_that_set_the_same_are_all_read(smoke: Trial) -> None:
    space = {"teacher": OneOf({"as it is": {}, "cold": {TEMP: 0.02}})}
    assert search(space).readings(smoke.but({TEMP: 0.02}).flat(), smoke) == [
        {"teacher": "as it is"},
        {"teacher": "cold"},
    ]


# ------------------------------------------------------------------------------------------------ what it starts from


def test_a_collapse_ends_a_trial_unless_it_is_said_otherwise(smoke: Trial) -> None:
    assert search().start(smoke).collapse.policy == "stop"
    assert search(fixed={"collapse.policy": "record"}).start(smoke).collapse.policy == "record"
    assert search().start(smoke, {"collapse.policy": "record"}).collapse.policy == "record"


def test_fixed_knobs_hold_and_overrides_have_the_last_word(smoke: Trial) -> None:
    start = search(fixed={"epochs": 5, "batch_size": 4}, seed=3).start(smoke, {"epochs": 6})
    assert (start.epochs, start.batch_size, start.seed) == (6, 4, 3)


@pytest.mark.parametrize(
    ("space", "overrides", "message"),
    [
        ({"optimizer.lrr": Between(0.1, 0.2)}, {}, r"unknown knob 'optimizer\.lrr'; did you mean 'optimizer\.lr'"),
        (
            {"operation": OneOf({"a": {}, "b": {"method.operation.kid": 1}})},
            {},
            r"unknown knob 'method\.operation\.kid'",
        ),
        (SPACE, {LR: 0.1}, r"optimizer\.lr: the search sets it itself"),
        (SPACE, {MOMENTUM: 0.1}, r"center_momentum: the search sets it itself"),
        (SPACE, {"seed": 1}, "seed: the search sets it itself"),
        (SPACE, {"epochs": 0}, "epochs = 0"),
        (
            {KIND: OneOf({"none": {}, "centering": {MOMENTUM: 0.5}})},
            {},
            r"method\.operation\.kind: is a knob, which levels",
        ),
    ],
)
def test_what_does_not_fit_the_baseline_is_refused(space: Any, overrides: Any, message: str, smoke: Trial) -> None:
    with pytest.raises(KnobError, match=message):
        search(space).start(smoke, overrides)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (Between(0.2, 0.1), r"optimizer\.lr = Between\(low=0\.2, high=0\.1.*: low must be below high"),
        (Between(0.1, 0.1), "low must be below high"),
        (Between(0.1, float("inf")), "both finite"),
        (Between(float("nan"), 1.0), "low must be below high"),
        (Between(0.0, 0.1, log=True), "log needs low above 0"),
        (Between(0.1, 0.2, log=True, step=0.1), "log and step exclude each other"),
        (Between(0.1, 0.2, step=0.03), "step must be above 0 and divide"),
        (Between(0.1, 0.2, step=-0.1), "step must be above 0 and divide"),
        (Between(1, 9, step=0.5), "the step of whole numbers must be whole"),
        (OneOf([0.1]), "needs at least two options"),
        (OneOf([0.1, 0.2, 0.1]), r"the option 0\.1 is given twice"),
        (0.1, r"optimizer\.lr = 0\.1: does not vary; allowed are Between and OneOf"),
    ],
)
def test_a_wrong_distribution_is_refused_by_its_knob(distribution: Any, message: str) -> None:
    with pytest.raises(KnobError, match=message):
        search({LR: distribution})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "nothing varies"),
        ({LR: Between(0.1, 0.2), ("epochs", LR): Between(1, 2)}, r"optimizer\.lr and epochs both set optimizer\.lr"),
        ({"a": OneOf({"x": {LR: 0.1}, "y": {}}), LR: Between(0.1, 0.2)}, r"a and optimizer\.lr both set optimizer\.lr"),
        ({"a": OneOf({"x": {LR: 0.1, (TEMP, LR): Between(0.1, 0.2)}, "y": {}})}, r"both set optimizer\.lr"),
        ({("a", "b"): OneOf({"x": {LR: 0.1}, "y": {}})}, "levels have a single name"),
        ({"seed": OneOf([0, 1])}, "seed: holds for the whole search"),
        (
            {"a": OneOf({"x": {LR: Between(0.1, 0.2)}, "y": {}}), "b": OneOf({"x": {LR: Between(0.1, 0.3)}, "z": {}})},
            r"optimizer\.lr \(x\): is searched in two ways|a and b both set",
        ),
        (
            {"a": OneOf({"y": {"b": OneOf({"x": {LR: Between(0.1, 0.2)}, "z": {}})}, "x": {LR: Between(0.1, 0.3)}})},
            r"optimizer\.lr \(x\): is searched in two ways",
        ),
        ({"a": OneOf({"x": {LR: Between(0.2, 0.1)}, "y": {}})}, r"optimizer\.lr \(x\) = .*low must be below high"),
    ],
)
def test_a_wrong_space_is_refused(space: Any, message: str) -> None:
    with pytest.raises(KnobError, match=message):
        search(space)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": None}, "budget: set trials, hours, or both"),
        ({"trials": 0}, "trials = 0: must be at least 1"),
        ({"hours": 0.0}, r"hours = 0\.0: must be above 0"),
        ({"hours": float("nan")}, "hours = nan: must be above 0"),
        ({"sampler": "tpr"}, "sampler = 'tpr': allowed are tpe, gp, nsga2, random, grid"),
        ({"pruner": "hyperband"}, "pruner = 'hyperband': allowed are none, asha, median"),
        ({"objectives": []}, "at least one, each once"),
        ({"objectives": [KNN, KNN]}, "at least one, each once"),
        ({"objectives": ["eval/knn_top"]}, "objectives: 'eval/knn_top' is not logged; did you mean 'eval/knn_top1'"),
        ({"objectives": ["schedule/lr"]}, "'schedule/lr' is better neither higher nor lower"),
        (
            {"objectives": [KNN, TRAIN_MINUTES], "pruner": "asha"},
            "pruner = 'asha': with several objectives only 'none'",
        ),
        ({"fixed": {LR: 0.1}}, r"optimizer\.lr: holds for the whole search"),
        ({"fixed": {"seed": 1}}, "seed: holds for the whole search"),
        ({"sampler": "grid"}, "no level may have knobs of its own"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KnobError, match=message):
        search(**options)


def test_a_grid_needs_numbers_that_can_be_counted() -> None:
    with pytest.raises(KnobError, match=r"optimizer\.lr = Between.*: sampler = 'grid' needs a step"):
        Search({LR: Between(0.1, 0.2)}, sampler="grid")
    levels = OneOf({"a": {KIND: "none"}, "b": {}})
    grid = Search({LR: Between(0.1, 0.3, step=0.1), "operation": levels}, sampler="grid")
    assert grid.grid == {LR: [0.1, 0.2, 0.3], "operation": ["a", "b"]}


def test_which_way_is_better_stands_in_the_records() -> None:
    one = search(objectives=[KNN, TRAIN_MINUTES, PEAK_MEMORY, "eval/knn_top1_5"])
    assert one.directions == ["maximize", "minimize", "minimize", "maximize"]
    assert search().objectives == (KNN,)
