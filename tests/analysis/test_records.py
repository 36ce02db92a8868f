"""Reading MLflow: the frames are what was written, the store is not touched, errors say what there is."""

import hashlib
import math
import sqlite3
from pathlib import Path

import pandas as pd
import pytest

from analysis import records


def read(lab: Path, name: str = "collapse", baseline: str = "shapes_cpu", **overrides: int) -> records.Sweep:
    return records.read(lab, name, baseline=baseline, overrides=overrides)


def test_every_trial_in_every_state_is_a_row(sweep):
    trials = sweep.trials
    assert len(trials) == 9
    assert list(trials["row"].unique()) == ["both", "centring only", "sharpening only"]
    assert list(trials["seed"]) == [0, 1, 2] * 3
    assert trials["state"].value_counts().to_dict() == {"finished": 7, "diverged": 1, "waiting": 1}
    assert trials.loc[3, ["verdict", "onset_step", "level:operations"]].to_list() == ["uniform", 140, "centring only"]
    assert pd.isna(trials.loc[0, "onset_step"])


def test_a_deleted_run_is_not_read(sweep):
    assert 7 not in set(sweep.trials["seed"])


def test_knobs_come_back_as_what_they_were(sweep):
    first = sweep.trials.iloc[0]
    assert sweep.trials["param:method.operation.kind"].to_list() == ["centering"] * 6 + ["none"] * 3
    assert first["param:method.head.out_dim"] == 256
    assert first["param:method.loss.teacher_temp"] == 0.04
    assert first["param:data.kind"] == "shapes"
    assert first["param:crops.local_crops_scale"] == "[0.15, 0.4]"


def test_the_sweep_says_what_was_asked(sweep):
    assert sweep.title == "collapse on shapes_cpu, epochs=8"
    assert sweep.options == ["--baseline shapes_cpu", "--set epochs=8"]
    assert sweep.baseline_row == "both"
    assert sweep.note.startswith("Do centring and sharpening")


def test_curves_and_last_values_are_what_was_recorded(sweep, recorded):
    for trial in sweep.trials[sweep.trials["state"] == "finished"].itertuples():
        curve = sweep.curves[sweep.curves["trial_id"] == trial.trial_id]
        for step in (0, 20, 400, 800):
            at_step = curve[curve["step"] == step].set_index("metric")["value"].to_dict()
            wanted = recorded(trial.row, trial.seed, step)
            evaluated = ("eval/", "factor/")
            known = {name: wanted[name] for name in wanted if name in records.CURVES or name.startswith(evaluated)}
            assert at_step == known
    last = sweep.trials.iloc[0]
    for name, value in recorded("both", 0, 800).items():
        assert last[name] == value


def test_the_later_of_two_values_of_a_step_stands(sweep, recorded):
    curve = sweep.curves.query("trial_id == '00abcdef01' and metric == 'train/kl' and step == 400")
    assert curve["value"].to_list() == [recorded("both", 0, 400)["train/kl"]]


def test_infinity_and_nan_come_back(sweep):
    diverged = sweep.trials[sweep.trials["state"] == "diverged"].iloc[0]
    assert diverged["train/gradient_norm"] == math.inf
    assert math.isnan(diverged["center/norm"])


def test_only_the_trials_that_are_asked_for_are_read(store):
    asked = {("both", "00abcdef01"), ("sharpening only", "21abcdef01"), ("as it was called", "01abcdef01")}
    chosen = records.read(store, "collapse", baseline="shapes_cpu", overrides={"epochs": 8}, asked=asked)
    assert list(chosen.trials["trial_id"]) == ["00abcdef01", "21abcdef01"]
    assert set(chosen.curves["trial_id"]) == {"00abcdef01", "21abcdef01"}


def test_trials_that_were_never_run_are_no_records(store):
    with pytest.raises(LookupError, match="no records of collapse as it is now"):
        records.read(store, "collapse", baseline="shapes_cpu", overrides={"epochs": 8}, asked={("both", "ffffffffff")})


def test_reading_leaves_the_store_as_it_is(lab):
    lab.chmod(0o555)
    (lab / "mlflow.db").chmod(0o444)
    before = hashlib.sha256((lab / "mlflow.db").read_bytes()).digest()
    read(lab, epochs=8)
    lab.chmod(0o755)
    assert [path.name for path in lab.iterdir()] == ["mlflow.db"]
    assert hashlib.sha256((lab / "mlflow.db").read_bytes()).digest() == before


def test_a_lab_without_a_store_is_named(tmp_path):
    with pytest.raises(LookupError, match=r"no records in .*: it has no mlflow\.db"):
        read(tmp_path)


def test_an_unknown_ablation_lists_the_known_ones(store):
    with pytest.raises(LookupError, match="no records of 'colapse' in this lab; with records: collapse"):
        read(store, "colapse")


def test_an_unknown_variant_lists_the_known_ones(store):
    known = "with records: --baseline shapes_cpu --set epochs=8; --baseline smoke"
    with pytest.raises(LookupError, match=f"no records of collapse with --baseline shapes_cpu; {known}"):
        read(store)


def test_a_sweep_that_has_not_begun_says_so(store):
    with pytest.raises(LookupError, match="none of its trials has a record yet"):
        read(store, baseline="smoke")


def test_every_bad_cell_is_named_at_once(lab):
    with sqlite3.connect(lab / "mlflow.db") as store:
        run = "(SELECT run_uuid FROM tags WHERE key = 'dino_lab.trial_id' AND value = ?)"
        change = f"UPDATE tags SET value = ? WHERE key = ? AND run_uuid IN {run}"
        store.execute(change, ["done", "dino_lab.state", "00abcdef01"])
        store.execute(change, ["flat", "dino_lab.verdict", "10abcdef01"])
        store.execute(change, ["1", "dino_lab.seed", "22abcdef01"])
        wrong = f"UPDATE latest_metrics SET value = 103 WHERE key = 'eval/knn_top1' AND run_uuid IN {run}"
        store.execute(wrong, ["20abcdef01"])
    store.close()
    with pytest.raises(ValueError, match="these records cannot be right") as error:
        read(lab, epochs=8)
    complaints = str(error.value).splitlines()[1:]
    assert any("00abcdef01: state is 'done'" in line for line in complaints)
    assert any("10abcdef01: verdict is 'flat'" in line for line in complaints)
    assert any("20abcdef01: eval/knn_top1 is 103.0" in line for line in complaints)
    for twice in ("21abcdef01", "22abcdef01"):
        assert any(f"{twice}: not the only one of row 'sharpening only' with seed 1" in line for line in complaints)
    assert len(complaints) == 5
