"""Searches: the study made again, importance, ranking, ready baselines, and a report that is the same every time."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from analysis import figures, records, report, search_figures, tables
from analysis import search as searches
from dino_lab.asking import parse_changes
from dino_lab.core.records import KNN, TRAIN_MINUTES
from dino_lab.orchestration.search import STUDIES
from experiments.baselines import BASELINES

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
LR, TEMP, MOMENTUM = "optimizer.lr", "method.loss.teacher_temp", "method.operation.center_momentum (centering)"


@pytest.fixture(scope="session")
def original(search_store) -> optuna.Study:
    """The study itself, as the search left it."""
    storage = JournalStorage(JournalFileBackend(str(search_store / "find" / STUDIES)))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


@pytest.fixture(scope="session")
def shares(search_store):
    return searches.importance(records.read(search_store, "find", baseline="smoke", overrides={}))


def only(sweep, kept):
    return replace(sweep, trials=sweep.trials[kept].reset_index(drop=True))


# ----------------------------------------------------------------------------------------------------------- records


def test_a_search_is_read_with_its_space_and_what_optuna_knows(search):
    asked = search.search
    assert list(asked.space) == [LR, TEMP, "method.head.out_dim", "operation", MOMENTUM, "optimizer.warmup_epochs"]
    assert asked.objectives == [KNN]
    assert asked.options == {"sampler": "random", "pruner": "median", "seed": 0, "trials": 48, "hours": None}
    assert asked.fixed == {"batch_size": 4}
    assert asked.refused_number == len(asked.refused) == 5
    assert set(search.trials["search_state"]) == {"COMPLETE", "PRUNED", "FAIL", "RUNNING"}
    assert set(search.trials["state"]) >= {"finished", "pruned", "stopped", "diverged", "failed"}
    assert search.trials["seeded"].sum() == 1
    told = search.trials[f"told:{KNN}"]
    assert told[search.trials["state"] == "diverged"].tolist() == [0.0] * 5
    assert told[search.trials["search_state"].isin(["FAIL", "RUNNING"])].isna().all()


def test_an_ablation_has_no_columns_of_a_search(sweep):
    assert sweep.search is None
    assert "search_state" not in sweep.trials


def test_a_state_that_optuna_has_not_is_refused(search):
    search.trials.loc[3, "search_state"] = "DONE"
    with pytest.raises(ValueError, match="search_state is 'DONE'"):
        records.check(search.trials, search.curves)


# --------------------------------------------------------------------------------------------------- the study, again


def test_the_study_in_memory_is_the_one_that_optuna_had(search, original):
    again = searches.study(search).trials
    tried = [trial for trial in original.trials if "refused" not in trial.user_attrs]
    assert len(again) == len(tried) == 44
    for one, other in zip(again, tried, strict=True):
        assert (one.state, one.values, one.params) == (other.state, other.values, other.params)
        assert one.distributions == other.distributions


def test_importance_is_what_optuna_says_of_the_original(shares, original):
    table = shares.loc[KNN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ped_anova = get_param_importances(original, evaluator=PedAnovaImportanceEvaluator())
        forests = pd.DataFrame(
            get_param_importances(original, evaluator=FanovaImportanceEvaluator(seed=seed))
            for seed in range(searches.FORESTS)
        )
    assert table["ped_anova"].to_dict() == pytest.approx(ped_anova)
    known = table.dropna()
    assert set(known.index) == set(forests)
    for column, expected in (("fanova", forests.mean()), ("least", forests.min()), ("greatest", forests.max())):
        assert known[column].to_dict() == pytest.approx(expected.to_dict())
    assert (known["least"] < known["fanova"]).all()
    assert (known["fanova"] < known["greatest"]).all()


def test_the_planted_knob_is_found_by_both(shares):
    table = shares.loc[KNN]
    assert table["fanova"].idxmax() == table["ped_anova"].idxmax() == LR
    assert table.at[LR, "fanova"] > 0.9
    assert searches.by_importance(shares)[0] == LR
    assert table["ped_anova"].sum() == pytest.approx(1)
    assert table["fanova"].sum() == pytest.approx(1)


def test_fanova_does_not_know_knobs_of_a_level_and_ped_anova_does(shares, search):
    assert np.isnan(shares.at[(KNN, MOMENTUM), "fanova"])
    assert shares.at[(KNN, MOMENTUM), "ped_anova"] > 0
    assert searches.by_importance(shares)[-1] == MOMENTUM
    text = tables.markdown(searches.importance_table(search, shares))
    assert re.search(r"center_momentum \(centering\) +\| +\| +0\.\d\d", text)
    assert "fANOVA does not know what is suggested only sometimes" in text


def test_each_objective_has_its_own_importance(weighed):
    shares = searches.importance(weighed)
    assert shares.loc[KNN, "fanova"].idxmax() == LR
    assert shares.loc[TRAIN_MINUTES, "fanova"].idxmax() == "method.head.out_dim"
    # Cost is better lower: what the cheap have in common is a small K.
    labels = list(searches.importance_table(weighed, shares).cells.index)
    assert len(labels) == 12
    assert labels[0] == "lr, k-NN %"
    assert labels[6] == "lr, runtime/train_minutes, min"


@pytest.mark.parametrize("reason", ["few trials", "all the same"])
def test_importance_is_missing_where_nothing_can_be_said(reason, search):
    complete = search.trials["search_state"] == "COMPLETE"
    if reason == "few trials":
        some = only(search, complete & (complete.cumsum() < searches.LEAST_TRIALS))
    else:
        some = replace(search, trials=search.trials.assign(**{f"told:{KNN}": search.trials[f"told:{KNN}"] * 0 + 50}))
    shares = searches.importance(some)
    assert shares.isna().all(axis=None)
    cells = searches.importance_table(some, shares).cells
    assert (cells == "").all(axis=None)
    assert searches.by_importance(shares) == list(search.search.space)
    figures.render(search_figures.importance(some, shares), "svg")


# ------------------------------------------------------------------------------------------------------------ the best


def test_trials_stand_best_first_and_none_is_dropped(search):
    order = searches.ranked(search)
    assert sorted(order["row"]) == sorted(search.trials["row"])
    assert order["search_state"].drop_duplicates().tolist() == ["COMPLETE", "PRUNED", "RUNNING", "FAIL"]
    complete = order.loc[order["search_state"] == "COMPLETE", f"told:{KNN}"]
    assert complete.is_monotonic_decreasing
    assert complete.iloc[0] == search.trials[f"told:{KNN}"].max()
    assert order["best"].tolist() == [True] + [False] * (len(order) - 1)


def test_the_front_is_what_no_other_is_better_than_in_everything(weighed):
    # As dear as the best, and not as good, but better than the cheap one of the front.
    (_, beaten, *_) = weighed.trials.sort_values([f"told:{TRAIN_MINUTES}", f"told:{KNN}"], ascending=False).index
    weighed.trials.loc[beaten, f"told:{KNN}"] = 83.0
    order = searches.ranked(weighed)
    values = order.loc[order["search_state"] == "COMPLETE", [f"told:{KNN}", f"told:{TRAIN_MINUTES}", "best"]]
    for knn, minutes, is_best in values.itertuples(index=False):
        better = (values.iloc[:, 0] >= knn) & (values.iloc[:, 1] <= minutes)
        strictly = better & ((values.iloc[:, 0] > knn) | (values.iloc[:, 1] < minutes))
        assert is_best == (not strictly.any())
    assert 1 < order["best"].sum() < 5
    table = searches.trials_table(weighed)
    assert table.best["k-NN %"] == table.best["runtime/train_minutes, min"] == list(range(order["best"].sum()))


@pytest.mark.parametrize("which", ["search", "weighed"])
def test_a_best_trial_is_a_ready_baseline(which, request):
    sweep = replace(request.getfixturevalue(which), overrides={"epochs": 5})
    for trial in searches.ranked(sweep).query("best").to_dict("records"):
        words = shlex.split(searches.flags(sweep, trial))
        assert words[:2] == ["--baseline", "smoke"]
        assert words[2::2] == ["--set"] * len(words[3::2])
        by_flags = BASELINES["smoke"].but(parse_changes(words[3::2]))
        scope = {}
        exec(searches.snippet(sweep, trial), scope)
        assert scope["BASELINE"] == by_flags
        for knob, value in json.loads(trial["suggested"]).items():
            if knob in by_flags.flat():
                assert by_flags.flat()[knob] == value
        assert (by_flags.batch_size, by_flags.epochs, by_flags.collapse.policy) == (4, 5, "record")


def test_words_and_lists_survive_the_way_to_a_baseline(search):
    trial = {
        "changes": json.dumps({"crops.local.scale": [0.1, 0.3], "precision": "bf16", "method.head.batch_norm": True})
    }
    words = shlex.split(searches.flags(search, trial))
    scope = {}
    exec(searches.snippet(search, trial), scope)
    assert BASELINES["smoke"].but(parse_changes(words[3::2])) == scope["BASELINE"]
    assert scope["BASELINE"].crops.local.scale == (0.1, 0.3)


# ---------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("search.csv", lambda sweep: tables.csv(searches.trials(sweep))),
        ("search.md", lambda sweep: tables.markdown(searches.trials_table(sweep))),
        ("search.tex", lambda sweep: tables.latex(searches.trials_table(sweep), label="find")),
    ],
)
def test_tables_are_the_golden_ones_byte_for_byte(search, name, text):
    assert text(search) == (GOLDEN / name).read_text()


def test_every_trial_and_every_refusal_has_a_row_and_missing_is_empty(search):
    cells = searches.trials_table(search).cells
    assert len(cells) == len(search.trials) + 5
    assert (cells["state"] == "refused").sum() == 5
    assert (cells.loc[cells["state"].isin(["refused", "failed", "running"]), "k-NN %"] == "").all()
    assert cells.loc[cells["state"] == "pruned", "k-NN %"].str.fullmatch(r"\(\d+\.\d\)").all()
    assert (cells.loc[cells["operation"] == "none", "center_momentum (centering)"] == "").all()
    assert set(cells["out_dim"]) == {"64", "256", "1024"}


def test_marks_say_what_happened_and_only_those_that_are_there_are_explained(search):
    table = searches.trials_table(search)
    marked = {mark: sum(mark in label for label in table.cells.index) for mark in "†‡§°"}
    assert marked == {"†": 1, "‡": 5, "§": 1, "°": 1}
    assert all(mark in table.notes[1] for mark in "†‡§°")
    healthy = searches.trials_table(only(search, (search.trials["verdict"] == "none") & ~search.trials["seeded"]))
    assert not any(mark in " ".join(healthy.notes) for mark in "†§°")


def test_how_trials_ended_is_told_in_a_line(search, weighed):
    assert searches.outcome_line(search) == (
        "21 of 44 trials complete (1 collapsed, 5 diverged), 20 pruned, 2 running, 1 failed,"
        " 5 more suggestions refused."
    )
    assert "pruned" not in searches.outcome_line(weighed)


def test_names_are_short_where_that_tells_them_apart(search):
    space = {name: {} for name in ("a.lr", "a.b.kind", "c.kind", "d.rate (x.y)", "e.rate (z)")}
    short = searches.short_names(replace(search, search=replace(search.search, space=space)))
    assert list(short.values()) == ["lr", "a.b.kind", "c.kind", "rate (x.y)", "rate (z)"]


# --------------------------------------------------------------------------------------------------------- the figures


def marks(axes):
    """Points by their marker, of those that have a line of their own."""
    counts = {}
    for line in axes.lines:
        if line.get_linestyle() == "None":
            key = (line.get_marker(), line.get_markerfacecolor())
            counts[key] = counts.get(key, 0) + len(line.get_xdata())
    return counts


def test_history_has_every_trial_with_its_mark_and_a_line_that_only_rises(search):
    (axes,) = search_figures.history(search).axes
    by_outcome = {
        outcome: marks(axes)[(look["marker"], look.get("markerfacecolor", "auto"))]
        for outcome in ("none", "uniform", "pruned")
        for look in [search_figures._mark(outcome)]
    }
    assert by_outcome == {"none": 15, "uniform": 1, "pruned": 20}
    assert sum(count for (marker, _), count in marks(axes).items() if marker == "x") == 5
    assert sum(count for (marker, _), count in marks(axes).items() if marker == "+") == 1
    (best,) = [line for line in axes.lines if line.get_linestyle() == "-"]
    heights = pd.Series(best.get_ydata()).dropna()
    assert heights.is_monotonic_increasing
    assert heights.iloc[-1] == search.trials[f"told:{KNN}"].max()


def test_history_of_several_objectives_has_no_best(weighed):
    assert [axes.get_title(loc="left") for axes in search_figures.history(weighed).axes] == [
        "k-NN %",
        "runtime/train_minutes, min",
    ]
    assert all(line.get_linestyle() == "None" for axes in search_figures.history(weighed).axes for line in axes.lines)


def test_slices_have_a_panel_for_each_knob_the_most_important_first(search, shares):
    panels = [axes for axes in search_figures.slices(search, shares).axes if axes.get_visible()]
    short = searches.short_names(search)
    assert [axes.get_xlabel() for axes in panels] == [short[name] for name in searches.by_importance(shares)]
    everywhere = sum(marks(panels[0]).values())
    assert everywhere == 42
    # Knobs of a level only where it was chosen.
    assert 0 < sum(marks(panels[-1]).values()) < everywhere
    labels = [text.get_text() for text in panels[0].get_xticklabels()]
    assert labels == ["0.001", "0.003", "0.01", "0.03", "0.1"]


def test_contour_is_over_the_two_most_important_knobs_with_collapsed_trials_marked(search, shares):
    axes, _bar = search_figures.contour(search, shares).axes
    short = searches.short_names(search)
    assert [axes.get_xlabel(), axes.get_ylabel()] == [short[name] for name in searches.by_importance(shares)[:2]]
    assert marks(axes)[("v", search_figures._mark("uniform")["markerfacecolor"])] == 1
    assert sum(marks(axes).values()) == 41


def test_what_is_far_from_every_trial_has_no_colour():
    surface = search_figures._smooth([0.0, 0.0], [0.0, 0.02], [10.0, 20.0])
    assert np.nanmin(surface) > 10.0
    assert np.nanmax(surface) < 20.0
    assert np.isnan(surface[-1, -1])
    assert 0.02 < np.mean(~np.isnan(surface)) < 0.2


def test_the_pareto_line_joins_the_front(weighed):
    (axes,) = search_figures.pareto(weighed).axes
    front = searches.ranked(weighed).query("best")
    assert sorted(axes.lines[0].get_ydata()) == sorted(front[f"told:{KNN}"])
    assert sum(marks(axes).values()) == (weighed.trials["search_state"] == "COMPLETE").sum()


def test_every_outcome_has_a_mark_of_its_own():
    outcomes = [*search_figures.COLORS, "pruned", "failed"]
    looks = {json.dumps(search_figures._mark(outcome), sort_keys=True) for outcome in outcomes}
    assert len(looks) == len(outcomes)


# ---------------------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="session")
def written(search_store):
    return report.write(search_store, "find", baseline="smoke", overrides={})


def test_the_same_records_give_the_same_bytes_in_another_process(written, search_store, tmp_path):
    before = {path.name: path.read_bytes() for path in written.iterdir() if path.is_file()}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-m", "analysis", "find", "--lab", str(search_store), "--baseline", "smoke"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == written
    assert done.stderr == ""
    assert {path.name: path.read_bytes() for path in written.iterdir() if path.is_file()} == before


def test_the_report_has_its_parts_and_asks_for_nothing_outside_itself(written):
    files = {path.name for path in written.iterdir()}
    for stem in ("trials", "importance"):
        assert {f"{stem}.csv", f"{stem}.md", f"{stem}.tex"} <= files
    for stem in ("history", "slices", "contour", "importance"):
        assert {f"{stem}.pdf", f"{stem}.png", f"{stem}.svg"} <= files
    assert "pareto.svg" not in files
    page = (written / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "What came out",
        "Over the search",
        "What mattered",
        "Every trial",
        "How it was made",
    ]
    assert "://" not in page
    assert "--baseline smoke" in page
    assert "BASELINE = BASELINES[&#34;smoke&#34;].but(" in page
    assert "21 of 44 trials complete" in page
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["search"] == "find"
    assert manifest["versions"]["optuna"] == optuna.__version__


def parts(sweep):
    """The report's figures by their stems, and its page without them."""
    shown, drawn, _ = report._of_search(sweep)
    return drawn, report.html(sweep, shown, dict.fromkeys(drawn, b""), [])


def test_several_objectives_have_a_front_in_the_report(weighed):
    drawn, page = parts(weighed)
    assert "pareto" in drawn
    assert "What is paid for what" in page
    assert page.count("No other is better in everything") == searches.ranked(weighed)["best"].sum()


def test_a_search_of_which_nothing_is_complete_has_a_report(search):
    drawn, page = parts(only(search, search.trials["search_state"] == "RUNNING"))
    assert all(figures.render(figure, "svg") for figure in drawn.values())
    assert "No trial is complete yet." in page
    assert "0 of 2 trials complete, 2 running" in page


def test_a_search_of_one_knob_has_no_plane(search):
    space = {LR: search.search.space[LR]}
    suggested = [json.dumps({LR: json.loads(each)[LR]}) for each in search.trials["suggested"]]
    narrow = replace(
        search,
        search=replace(search.search, space=space, refused=[], refused_number=0),
        trials=search.trials.assign(suggested=suggested),
    )
    drawn, page = parts(narrow)
    assert set(drawn) == {"history", "importance", "slices"}
    assert "refused" not in page


def test_what_a_person_wrote_is_text_and_never_markup(search):
    evil = "<script>alert(1)</script>"
    named = replace(search, note=evil, overrides={"data.name": evil}, trials=search.trials.assign(row=f"#1 {evil}"))
    page = report.html(
        named,
        {"trials": searches.trials_table(named), "importance": searches.trials_table(named)},
        dict.fromkeys(["history", "importance", "slices"], b""),
        [],
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
