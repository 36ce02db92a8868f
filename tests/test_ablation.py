from typing import Self

import pytest
from pydantic import model_validator

from dino_lab.ablation import Ablation, Axis, Like, TrialOf, meaning
from dino_lab.core.settings import KnobError
from dino_lab.core.trial import Trial

TEMP = Axis.over("method.loss.teacher_temp", [0.02, 0.04, 0.07])
DIMENSIONS = ("embed_dim", "depth", "num_heads")
OPERATIONS = Axis("operations", {"both": {}, "centring only": {"method.loss.sharpening": False}})


def test_levels_over_a_knob_are_called_by_their_values() -> None:
    assert dict(TEMP.levels) == {
        "0.02": {"method.loss.teacher_temp": 0.02},
        "0.04": {"method.loss.teacher_temp": 0.04},
        "0.07": {"method.loss.teacher_temp": 0.07},
    }
    assert list(Axis.over("k", [True, None, 2, "bf16", [0.1, 1.0]]).levels) == [
        "true",
        "null",
        "2",
        "bf16",
        "[0.1, 1.0]",
    ]


def test_a_grid_has_every_combination_and_its_last_axis_varies_fastest() -> None:
    rows = Ablation.grid([OPERATIONS, TEMP]).rows
    assert [tuple(row.levels.values()) for row in rows] == [
        (operations, temp) for operations in ("both", "centring only") for temp in ("0.02", "0.04", "0.07")
    ]
    assert rows[4].label == "operations centring only, method.loss.teacher_temp 0.04"
    assert rows[4].levels == {"operations": "centring only", "method.loss.teacher_temp": "0.04"}
    assert rows[4].changes == {"method.loss.sharpening": False, "method.loss.teacher_temp": 0.04}


def test_rows_of_a_single_axis_are_called_by_their_level() -> None:
    assert [row.label for row in Ablation.grid([TEMP]).rows] == ["0.02", "0.04", "0.07"]
    assert [row.label for row in Ablation.one_at_a_time([TEMP]).rows] == ["baseline", "0.02", "0.04", "0.07"]


def test_one_at_a_time_is_the_baseline_and_each_level_alone() -> None:
    rows = Ablation.one_at_a_time([OPERATIONS, TEMP]).rows
    assert [(row.label, dict(row.changes)) for row in rows] == [
        ("baseline", {}),
        ("operations both", {}),
        ("operations centring only", {"method.loss.sharpening": False}),
        ("method.loss.teacher_temp 0.02", {"method.loss.teacher_temp": 0.02}),
        ("method.loss.teacher_temp 0.04", {"method.loss.teacher_temp": 0.04}),
        ("method.loss.teacher_temp 0.07", {"method.loss.teacher_temp": 0.07}),
    ]
    assert rows[2].levels == {"operations": "centring only"}


def test_the_first_row_is_what_others_are_compared_with() -> None:
    assert Ablation.grid([TEMP]).baseline_row == "0.02"
    assert Ablation.one_at_a_time([TEMP]).baseline_row == "baseline"


def test_all_rows_of_the_first_seed_come_first(smoke: Trial) -> None:
    trials = Ablation.grid([TEMP], seeds=[5, 3]).trials(smoke)
    assert [(trial.seed, trial.row_index, trial.row) for trial in trials] == [
        (seed, index, label) for seed in (5, 3) for index, label in enumerate(["0.02", "0.04", "0.07"])
    ]
    assert [(t.trial.seed, t.trial.method.loss.teacher_temp) for t in trials] == [
        (seed, temp) for seed in (5, 3) for temp in (0.02, 0.04, 0.07)
    ]


def test_arms_differ_from_the_baseline_in_their_own_knobs_alone(smoke: Trial) -> None:
    for labelled in Ablation.grid([OPERATIONS, TEMP], seeds=[2]).trials(smoke):
        differs = {knob for knob, value in labelled.trial.flat().items() if value != smoke.flat()[knob]}
        assert differs <= {"seed", "method.loss.teacher_temp", "method.loss.sharpening"}


def test_seeds_may_be_others_than_the_ablations(smoke: Trial) -> None:
    assert [t.seed for t in Ablation.grid([OPERATIONS]).trials(smoke, seeds=[7])] == [7, 7]
    assert Ablation.grid([OPERATIONS]).trials(smoke, seeds=[]) == []


def test_fixed_knobs_hold_for_every_row_and_the_row_has_the_last_word(smoke: Trial) -> None:
    ablation = Ablation.grid([OPERATIONS], seeds=[0], fixed={"method.loss.sharpening": True, "optimizer.lr": 0.5})
    assert [(t.trial.optimizer.lr, t.trial.method.loss.sharpening) for t in ablation.trials(smoke)] == [
        (0.5, True),
        (0.5, False),
    ]


def test_overrides_change_the_baseline_of_every_row(smoke: Trial) -> None:
    trials = Ablation.one_at_a_time([TEMP], seeds=[0]).trials(smoke, overrides={"epochs": 1})
    assert {t.trial.epochs for t in trials} == {1}


def test_an_override_of_what_a_row_sets_is_refused(smoke: Trial) -> None:
    with pytest.raises(KnobError, match=r"method.loss.teacher_temp: row '0.02' sets it itself"):
        Ablation.one_at_a_time([TEMP]).trials(smoke, overrides={"method.loss.teacher_temp": 0.01})


def test_a_row_with_a_seed_of_its_own_is_refused(smoke: Trial) -> None:
    with pytest.raises(KnobError, match="seed: row '7' sets it itself"):
        Ablation.grid([Axis.over("seed", [7])]).trials(smoke)


def test_a_value_given_twice_is_refused() -> None:
    with pytest.raises(KnobError, match=r"'method.loss.teacher_temp': the value 0.04 is given twice"):
        Axis.over("method.loss.teacher_temp", [0.04, 0.04])


def test_two_axes_of_a_grid_that_set_one_knob_are_refused() -> None:
    with pytest.raises(KnobError, match=r"'method.loss.teacher_temp' and 'twin' both set method.loss.teacher_temp"):
        Ablation.grid([TEMP, Axis("twin", {"a": {"method.loss.teacher_temp": 0.01}})])


def test_rows_that_come_to_the_same_trial_share_its_identity(smoke: Trial) -> None:
    baseline, both, *_ = Ablation.one_at_a_time([OPERATIONS], seeds=[0]).trials(smoke)
    assert (baseline.row, both.row) == ("baseline", "both")
    assert baseline.trial.identity == both.trial.identity


def test_all_other_trials_have_identities_of_their_own(smoke: Trial) -> None:
    trials = Ablation.grid([OPERATIONS, TEMP], seeds=[0, 1, 2]).trials(smoke)
    assert len({trial.trial.identity for trial in trials}) == 18


def test_a_wrong_knob_is_named_with_its_row(smoke: Trial) -> None:
    axis = Axis("temps", {"good": {}, "bad": {"method.teacher_tmp": 0.1}})
    with pytest.raises(KnobError, match=r"row 'bad': unknown knob 'method\.teacher_tmp'; did you mean"):
        Ablation.grid([axis]).trials(smoke)


@pytest.mark.parametrize("overrides", [{"optimizer.lrr": 1.0}, {"optimizer.lr": -1.0}])
def test_a_wrong_override_is_refused(smoke: Trial, overrides: dict[str, float]) -> None:
    with pytest.raises(KnobError, match=r"optimizer\.lr"):
        Ablation.grid([TEMP]).trials(smoke, overrides=overrides)


def test_the_published_study_is_kept() -> None:
    assert Ablation.grid([TEMP], published="teacher_temperature").published == "teacher_temperature"
    assert Ablation.one_at_a_time([TEMP]).published is None


def test_the_papers_names_of_rows_are_kept() -> None:
    assert Ablation.grid([TEMP], paper_rows={"0.02": "cold"}).paper_rows == {"0.02": "cold"}
    assert Ablation.one_at_a_time([TEMP]).paper_rows == {}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"0.03": "cold"}, "no row is called 0.03"),
        ({"0.02": "cold", "0.04": "cold"}, "two rows are the paper's cold"),
        ({"0.02": "0.04"}, "two rows are the paper's 0.04"),
    ],
)
def test_the_papers_names_of_rows_are_of_one_row_each(names: dict[str, str], message: str) -> None:
    with pytest.raises(KnobError, match=message):
        Ablation.grid([TEMP], paper_rows=names)


# ------------------------------------------------------------------------------------------- stated and unstated knobs


def test_what_comes_with_a_stated_kind_is_told(smoke: Trial) -> None:
    axis = Axis("method", {"dino": {}, "byol": {"method.kind": "byol", "method.head.out_dim": 8}})
    dino, byol = Ablation.grid([axis], seeds=[0]).trials(smoke)
    assert dino.implied == {}
    assert byol.implied["method.head.layers_number"] == byol.trial.method.head.layers_number == 2
    assert smoke.method.head.layers_number == 3
    assert "method.head.out_dim" not in byol.implied  # it is stated
    assert "method.teacher.momentum_teacher" not in byol.implied  # it is the baseline's
    assert set(byol.implied) <= {knob for knob in byol.trial.flat() if knob.startswith("method.")}


def test_what_a_kind_adds_is_told(smoke: Trial) -> None:
    axis = Axis("method", {"moco": {"method.kind": "moco", "method.queue_size": 32}})
    (moco,) = Ablation.grid([axis], seeds=[0]).trials(smoke)
    assert moco.implied["method.temp"] == 0.2
    assert "method.queue_size" not in moco.implied


def test_another_network_lets_go_of_the_dimensions_of_the_one_before(smoke: Trial) -> None:
    axis = Axis("backbone", {"as it is": {}, "small": {"backbone.name": "vit_small_patch8_224"}})
    _, small = Ablation.grid([axis], seeds=[0]).trials(smoke)
    assert small.implied == dict.fromkeys(["backbone.patch_size", *(f"backbone.{knob}" for knob in DIMENSIONS)])


def test_a_section_may_be_stated_whole(smoke: Trial) -> None:
    loss = smoke.but({"method.loss.teacher_temp": 0.07}).model_dump(mode="json")["method"]["loss"]
    (row,) = Ablation.grid([Axis("loss", {"hot": {"method.loss": loss}})], seeds=[0]).trials(smoke)
    assert row.implied == {"method.loss.teacher_temp": 0.07}


def test_a_kind_that_stays_brings_nothing_along(smoke: Trial) -> None:
    baseline = Coupled.of(smoke.model_dump(mode="json"))
    axis = Axis("parts", {"2": {"method.kind": "dino", "accumulation_steps": 2}})
    with pytest.raises(KnobError, match="more than it states: batch_size"):
        Ablation.grid([axis], seeds=[0]).trials(baseline)


class Coupled(Trial):
    """A trial in which one knob silently sets another."""

    @model_validator(mode="after")
    def _couple(self) -> Self:
        object.__setattr__(self, "batch_size", 8 * self.accumulation_steps)
        return self


def test_a_row_that_differs_in_more_than_it_states_is_refused(smoke: Trial) -> None:
    baseline = Coupled.of(smoke.model_dump(mode="json"))
    axis = Axis("parts", {"1": {}, "2": {"accumulation_steps": 2}})
    with pytest.raises(KnobError, match=r"row '2': differs from the baseline in more than it states: batch_size$"):
        Ablation.grid([axis], seeds=[0]).trials(baseline)
    stated = Axis("parts", {"1": {}, "2": {"accumulation_steps": 2, "batch_size": 16}})
    assert len(Ablation.grid([stated], seeds=[0]).trials(baseline)) == 2


# -------------------------------------------------------------------------------- values that are not written down


def test_a_level_may_take_the_baselines_value_of_another_knob(smoke: Trial) -> None:
    axis = Axis("embed_dim", {"as hidden_dim": {"backbone.embed_dim": Like("method.head.bottleneck_dim")}})
    (row,) = Ablation.grid([axis], seeds=[0]).trials(
        smoke.but({"backbone.num_heads": 2}), overrides={"method.head.bottleneck_dim": 6}
    )
    assert row.trial.backbone.embed_dim == 6


def test_a_level_may_multiply_the_baselines_value(smoke: Trial) -> None:
    axis = Axis(
        "times", {"1.5": {"epochs": Like("epochs", times=1.5), "optimizer.lr": Like("optimizer.lr", times=0.5)}}
    )
    (row,) = Ablation.grid([axis], seeds=[0]).trials(smoke.but({"epochs": 3, "optimizer.lr": 0.1}))
    assert (row.trial.epochs, row.trial.optimizer.lr) == (4, 0.05)


@pytest.mark.parametrize(("before", "times", "after"), [(3, 4 / 3, 4), (3, 1 / 3, 1), (49, 1 / 49, 1), (3, 1.5, 4)])
def test_a_multiple_of_a_whole_number_is_rounded_down(before: int, times: float, after: int, smoke: Trial) -> None:
    axis = Axis.times("epochs", {"so much": times})
    (row,) = Ablation.grid([axis], seeds=[0]).trials(smoke.but({"epochs": before, "optimizer.warmup_epochs": 0.0}))
    assert (row.row, row.trial.epochs) == ("so much", after)


def test_a_level_may_need_the_trial_of_a_row_before_it_with_the_same_seed(smoke: Trial) -> None:
    frozen = {"method.teacher.kind": "frozen", "method.teacher.checkpoint": TrialOf("cold")}
    axis = Axis("teacher", {"warm": {}, "cold": {"method.loss.teacher_temp": 0.02}, "frozen": frozen})
    trials = Ablation.grid([axis], seeds=[0, 1]).trials(smoke)
    ids = {(each.row, each.seed): each.trial.identity for each in trials}
    assert [each.trial.method.teacher.checkpoint for each in trials if each.row == "frozen"] == [
        ids["cold", 0],
        ids["cold", 1],
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TrialOf("later"), "row 'first': trial of row 'later': no row before it has this label"),
        (Like("method.depth"), "row 'first': like 'method.depth': the baseline does not set it"),
        (Like("runtime.data_dir"), "row 'first': like 'runtime.data_dir': the baseline does not set it"),
        (Like("method.head.batch_norm", times=2), "'method.head.batch_norm': False of the baseline cannot be mult"),
        (Like("precision", times=2), "'precision': 'f32' of the baseline cannot be multiplied"),
    ],
)
def test_a_value_that_stands_for_nothing_is_refused(value: str, message: str, smoke: Trial) -> None:
    axis = Axis("axis", {"first": {"backbone.name": value}, "later": {}})
    with pytest.raises(KnobError, match=message):
        Ablation.grid([axis]).trials(smoke)


def test_what_a_value_stands_for_is_said() -> None:
    assert meaning(Like("epochs", times=0.5)) == "the baseline's epochs x 0.5"
    assert meaning(Like("epochs", times=4 / 3), 4) == "4 (the baseline's epochs x 1.33)"
    assert meaning(Like("method.head.out_dim")) == "the baseline's method.head.out_dim"
    assert meaning(TrialOf("supervised")) == "the trial of supervised"
    assert [meaning(value) for value in ("mse", 0.04, None, [1, 2])] == ['"mse"', "0.04", "null", "[1, 2]"]


def test_every_row_may_be_given_what_a_row_takes_from_the_baseline(smoke: Trial) -> None:
    axis = Axis("epochs", {"x1": {}, "x2": {"epochs": Like("epochs", times=2)}})
    trials = Ablation.grid([axis], seeds=[0]).trials(smoke, overrides={"epochs": 5})
    assert [each.trial.epochs for each in trials] == [5, 10]
