"""Tables: golden files, and what marks, bold and published numbers say."""

import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis import summary, tables
from analysis.published import published

GOLDEN = Path(__file__).parent / "golden"


def renamed(sweep, labels, **changes):
    """The sweep with other row labels."""
    names = dict(zip(["both", "centring only", "sharpening only"], labels, strict=True))
    trials = sweep.trials.assign(row=sweep.trials["row"].map(names))
    return replace(sweep, trials=trials, baseline_row=labels[0], **changes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("table.md", lambda sweep: tables.markdown(tables.arms_table(sweep))),
        ("table.tex", lambda sweep: tables.latex(tables.arms_table(sweep), label="collapse-table")),
        ("table.csv", lambda sweep: tables.csv(tables.arms(sweep))),
        ("factors.md", lambda sweep: tables.markdown(tables.factors_table(sweep))),
        ("factors.tex", lambda sweep: tables.latex(tables.factors_table(sweep), label="collapse-factors")),
        ("factors.csv", lambda sweep: tables.csv(tables.factors(sweep))),
        ("evaluations.md", lambda sweep: tables.markdown(tables.evaluations_table(sweep))),
        ("evaluations.tex", lambda sweep: tables.latex(tables.evaluations_table(sweep), label="collapse-evaluations")),
        ("evaluations.csv", lambda sweep: tables.csv(tables.evaluations(sweep))),
        ("cost.md", lambda sweep: tables.markdown(tables.cost_table(sweep))),
        ("cost.tex", lambda sweep: tables.latex(tables.cost_table(sweep), label="collapse-cost")),
        ("cost.csv", lambda sweep: tables.csv(tables.cost(sweep))),
    ],
)
def test_tables_are_the_golden_ones_byte_for_byte(sweep, name, text):
    assert text(sweep).encode() == (GOLDEN / name).read_bytes()


def test_what_is_missing_is_empty_and_never_zero(sweep):
    table = tables.arms(sweep)
    assert table.loc["both", ["onset_median", "difference_mean", "difference_p"]].isna().all()
    assert table.loc["centring only", ["knn_n", "difference_n"]].to_list() == [2, 1]
    assert table.loc["centring only", ["difference_half", "difference_p"]].isna().all()
    assert table.loc["raw pixels", ["finished", "kl_mean"]].isna().all()


def test_collapsed_and_diverged_rows_are_marked(sweep):
    labels = list(tables.arms_table(sweep).cells.index)
    assert labels == ["both", "centring only † ‡", "sharpening only †", "untrained network", "raw pixels"]


def test_the_best_over_training_stands_apart_and_is_no_result(sweep):
    table = tables.evaluations(sweep)
    curves = sweep.curves[(sweep.curves["metric"] == "eval/knn_top1") & (sweep.curves["step"] > 0)]
    for row in ("both", "sharpening only"):
        trials = sweep.trials[(sweep.trials["row"] == row) & (sweep.trials["state"] == "finished")]
        highest = [max(curves.loc[curves["trial_id"] == each, "value"]) for each in trials["trial_id"]]
        assert table.loc[row, "best_knn_mean"] == pytest.approx(sum(highest) / len(highest))
    assert table.loc["sharpening only", "best_knn_mean"] > table.loc["sharpening only", "knn_mean"]
    assert pd.isna(table.loc["untrained network", "best_knn_mean"])
    shown = tables.evaluations_table(sweep)
    assert "best k-NN %" not in shown.best
    assert "chosen on the test images, and so too high; no result" in shown.notes[1]


def test_evaluations_that_no_trial_has_are_no_columns(sweep):
    assert "linear_mean" not in tables.evaluations(sweep)
    with_linear = replace(sweep, trials=sweep.trials.assign(**{"eval/linear_top1": 70.0}))
    assert tables.evaluations(with_linear).loc["both", "linear_mean"] == 70
    assert "linear %" in tables.evaluations_table(with_linear).cells


def with_trial(sweep, row, seed, **changes):
    """The sweep with other values in one of its trials."""
    trials = sweep.trials.copy()
    place = (trials["row"] == row) & (trials["seed"] == seed)
    assert place.sum() == 1
    for column, value in changes.items():
        trials.loc[place, column] = value
    return replace(sweep, trials=trials)


def test_a_trial_that_was_stopped_is_counted_by_its_verdict_marked_and_makes_no_pair(sweep):
    stopped = with_trial(sweep, "sharpening only", 0, state="stopped")
    before, after = tables.arms(sweep).loc["sharpening only"], tables.arms(stopped).loc["sharpening only"]
    assert after["stopped"] == 1
    assert after["one_prototype"] == before["one_prototype"]
    assert after["knn_mean"] == before["knn_mean"]
    assert after["difference_n"] == before["difference_n"] - 1
    shown = tables.arms_table(stopped)
    assert shown.cells.index[2] == "sharpening only † §"
    assert "§ a trial was stopped for its collapse" in shown.notes[1]
    assert "§" not in "".join(tables.arms_table(sweep).notes)


def test_a_collapse_that_was_left_is_told(sweep):
    left = with_trial(sweep, "both", 1, left="constant 30–210")
    assert tables.arms(left).loc["both", "left"] == 1
    shown = tables.arms_table(left)
    assert shown.cells.index[0] == "both ¶"
    assert "left it: both, seed 1: constant 30–210." in shown.notes[1]
    assert "¶" not in "".join(tables.arms_table(sweep).notes)


def test_a_trial_that_has_not_started_is_no_collapse_and_has_no_onset(sweep):
    table = tables.arms(with_trial(sweep, "both", 1, verdict="not_started", onset_step=10)).loc["both"]
    assert table["not_started"] == 1
    assert pd.isna(table["onset_median"])
    assert tables.arms_table(with_trial(sweep, "both", 1, verdict="not_started")).cells.index[0] == "both"


def test_references_are_never_the_best(sweep):
    trials = sweep.trials.assign(**{"eval/knn_top1": sweep.trials["eval/knn_top1"] / 10})
    assert tables.arms_table(replace(sweep, trials=trials)).best == {"k-NN %": [0]}


def test_values_that_look_the_same_are_best_together(sweep):
    trials = sweep.trials.assign(**{"eval/knn_top1": sweep.trials["row_index"].map({0: 50.01, 1: 50.02, 2: 49.9})})
    assert tables.arms_table(replace(sweep, trials=trials)).best == {"k-NN %": [0, 1]}


def test_without_a_second_pair_there_is_no_p(sweep):
    one_seed = replace(sweep, trials=sweep.trials[sweep.trials["seed"] == 0])
    table = tables.arms_table(one_seed)
    assert "Δ k-NN" in table.cells
    assert "p" not in table.cells
    assert table.notes[-1] == "Δ: difference from both, paired by seed."


def test_a_sweep_of_one_row_has_no_differences(sweep):
    alone = replace(sweep, trials=sweep.trials[sweep.trials["row"] == "both"])
    assert list(tables.arms_table(alone).cells) == [
        "n",
        "entropy / ln K",
        "KL, nats",
        "verdict",
        "onset, step",
        "k-NN %",
    ]


def test_no_factor_makes_no_factor_table(sweep):
    without = sweep.trials.drop(columns=[name for name in sweep.trials if name.startswith("factor/")])
    assert tables.factors(replace(sweep, trials=without)).empty


def test_a_factor_has_its_difference_from_the_baseline_row_in_a_column_of_its_own(sweep):
    table = tables.factors(sweep)
    wanted = summary.differences(sweep.trials, "factor/knn_top1_shape", baseline_row="both")
    for number in ("n", "mean", "half"):
        column = table[f"shape_difference_{number}"]
        pd.testing.assert_series_equal(column.iloc[:3], wanted[number], check_names=False)
        assert column.iloc[3:].isna().all()
    assert tables.factor_names(table) == ["colour", "shape", "texture"]
    assert list(tables.factors_table(sweep).cells) == ["colour", "shape", "texture"]


def test_a_factor_that_a_row_does_not_have_is_missing(of_two_data_sets):
    table = tables.factors(of_two_data_sets)
    assert tables.factor_names(table) == ["colour", "digit", "shape", "texture"]
    # The references are those of the first row that has the factor.
    assert table["digit_n"].to_list() == [0, 0, 3, 3, 3]
    assert table["shape_n"].to_list() == [2, 2, 0, 2, 2]
    shown = tables.factors_table(of_two_data_sets)
    assert list(shown.cells["digit"][:3]) == ["", "", "14.6 ± 0.4"]
    assert shown.cells.loc["sharpening only †", "shape"] == ""
    assert shown.best["digit"] == [2]


def test_rows_that_are_judged_by_different_images_are_not_ranked(sweep):
    trials = sweep.trials.assign(**{"param:evals.data.kind": "same"})
    trials.loc[trials["row"] == "sharpening only", "param:evals.data.kind"] = "digits"
    shown = tables.arms_table(replace(sweep, trials=trials))
    assert shown.best == {}
    assert "k-NN of one and of another are not to be compared" in shown.notes[2]
    assert shown.cells["Δ k-NN"].to_list() == ["", tables.arms_table(sweep).cells["Δ k-NN"].iloc[1], "", "", ""]
    assert "the foot is of the first row that is" in tables.factors_table(replace(sweep, trials=trials)).notes[0]
    assert tables.arms_table(sweep).best != {}


def test_data_without_labels_have_a_table_without_knn(unlabelled, sweep):
    table = tables.arms(unlabelled)
    assert list(table.index) == ["both", "centring only", "sharpening only"]
    assert table["knn_n"].to_list() == [0, 0, 0]
    shown, labelled = tables.arms_table(unlabelled), tables.arms_table(sweep)
    assert list(shown.cells["k-NN %"]) == ["", "", ""]
    assert shown.best == {"k-NN %": []}
    assert {"Δ k-NN", "p"}.isdisjoint(shown.cells)
    assert shown.notes[2:] == ["k-NN: no trial has it, as on data without labels."]
    others = [column for column in shown.cells if column != "k-NN %"]
    pd.testing.assert_frame_equal(shown.cells[others], labelled.cells[others].iloc[:3])
    assert tables.factors(unlabelled).empty


def test_a_table_without_references_has_no_rule_above_them(unlabelled):
    for table in (tables.arms_table(unlabelled), tables.cost_table(unlabelled)):
        assert table.references == 0
        assert tables.latex(table, label="x").count(r"\midrule") == 1


def test_records_without_minutes_make_no_table_of_cost(sweep):
    old = sweep.trials.drop(columns=["runtime/train_minutes", "runtime/peak_memory_mib"])
    assert tables.cost(replace(sweep, trials=old)).empty


def test_a_row_without_a_cost_stays_in_the_table(sweep):
    trials = sweep.trials.copy()
    trials.loc[trials["row"] == "both", ["runtime/train_minutes", "runtime/peak_memory_mib"]] = math.nan
    cells = tables.cost_table(replace(sweep, trials=trials)).cells
    assert cells.loc["both"].to_list() == ["2/3", "", "", "410 ± 6"]


@pytest.mark.parametrize(("minutes", "shown"), [(0.5, "0.50"), (5.0, "5.00"), (45.9, "45.9"), (4356, "4356")])
def test_a_cost_has_three_digits_and_at_most_two_decimals(sweep, minutes, shown):
    trials = sweep.trials[sweep.trials["seed"] == 0].assign(**{"runtime/train_minutes": float(minutes)})
    assert list(tables.cost_table(replace(sweep, trials=trials)).cells["training, min"]) == [shown] * 3


def test_the_papers_cost_stands_beside_ours_with_its_source_once(sweep):
    asked = renamed(
        sweep, ["2+0", "2+2", "y"], published="crop_count", paper_rows={"2+0": "2x224", "2+2": "2x224+2x96"}
    )
    table = tables.cost_table(asked)
    assert list(table.cells["paper hours"]) == ["15.3 / 45.9 (2x224)", "17.0 / 51.0 (2x224+2x96)", ""]
    assert list(table.cells["paper GiB a GPU"]) == ["9.3 / 9.3 (2x224)", "10.5 / 10.5 (2x224+2x96)", ""]
    (note,) = [note for note in table.notes if "arXiv" in note]
    assert note == (
        "paper hours, paper GiB a GPU (in brackets the paper's own value): arXiv:2104.14294, Table 8, ViT-S/16,"
        " ImageNet-1k, 100 epochs, two 8-GPU machines / Table 8, ViT-S/16, ImageNet-1k, 300 epochs, two 8-GPU machines."
    )
    assert "paper_linear_top1" not in tables.cost(asked)
    assert "paper_wall_hours" not in tables.arms(asked)


def test_a_published_number_stands_beside_the_row_of_its_name(sweep):
    asked = renamed(sweep, ["0.04", "0.08", "0.05"], published="teacher_temperature")
    table = tables.arms_table(asked)
    assert list(table.cells["paper k-NN %"]) == ["69.6", "0.1", "", "", ""]
    assert "paper linear %" not in table.cells
    assert "paper k-NN: arXiv:2104.14294, Appendix D, ViT-S/16, ImageNet-1k, 100 epochs." in table.notes


def test_a_row_may_have_another_name_in_the_paper(sweep):
    names = {"x1": "6", "x2": "12"}
    asked = renamed(sweep, ["x1", "x2", "6"], published="attention_heads", paper_rows=names)
    table = tables.arms_table(asked)
    assert list(table.cells["paper k-NN %"]) == ["72.8 (6)", "73.7 (12)", "", "", ""]
    assert any("k-NN (in brackets the paper's own value): arXiv" in note for note in table.notes)


def test_a_row_that_is_another_of_the_papers_has_no_number_of_its_own_label(sweep):
    asked = renamed(sweep, ["8", "x2", "y"], published="attention_heads", paper_rows={"8": "16"})
    assert list(tables.arms_table(asked).cells["paper k-NN %"]) == ["73.8 (16)", "", "", "", ""]


def test_published_numbers_at_two_settings_both_stand(sweep):
    asked = renamed(sweep, ["2x224", "2x224+2x96", "2x224+6x96"], published="crop_count")
    table = tables.arms_table(asked)
    assert list(table.cells["paper linear %"])[:3] == ["67.8 / 72.5", "71.5 / 74.5", "73.8 / 75.9"]
    assert "paper k-NN %" not in table.cells
    assert "100 epochs, two 8-GPU machines / Table 8, ViT-S/16, ImageNet-1k, 300 epochs" in table.notes[-1]


def test_a_study_without_a_row_of_that_name_adds_no_column(sweep):
    assert "paper k-NN %" not in tables.arms_table(replace(sweep, published="components")).cells


def test_published_arms_stay_text_and_an_unknown_study_is_empty():
    assert set(published("teacher_temperature", {})["row"]) == {"0", "0.02", "0.04", "0.06", "0.08", "0.04->0.07"}
    assert published("", {}).empty


def test_labels_are_escaped(sweep):
    asked = renamed(sweep, ["50 % & a_b", "x|y *", "<script>{#$^~\\}"])
    table = tables.arms_table(asked)
    latex = tables.latex(table, label="x")
    assert r"50 \% \& a\_b & 2/3" in latex
    assert r"$<$script$>$\{\#\$\textasciicircum{}\textasciitilde{}\textbackslash{}\}" in latex
    markdown = tables.markdown(table)
    assert r"| x\|y \* †" in markdown
    assert "\\<script>" in markdown


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(sweep, tmp_path):
    asked = renamed(sweep, ["50 % & a_b", "0.04->0.07", "<x>{#$^~\\}"])
    made = (tables.arms_table, tables.factors_table, tables.cost_table)
    body = "".join(tables.latex(table(asked), label=table.__name__) for table in made)
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}\end{{document}}"
    (tmp_path / "page.tex").write_text(document)
    subprocess.run(["pdflatex", "-halt-on-error", "page.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_csv_keeps_every_number_in_a_column_of_its_own(sweep, tmp_path):
    (tmp_path / "table.csv").write_text(tables.csv(tables.arms(sweep)))
    table = pd.read_csv(tmp_path / "table.csv", index_col="arm")
    wanted = tables.arms(sweep).astype(float)
    pd.testing.assert_frame_equal(table.astype(float), wanted, rtol=1e-5)
