"""A search: its trials -> what mattered, which were best, and a baseline of the best; numbers, tables and text.

Importance is Optuna's, over a study that is made again in memory: the frames are all that is read.
"""

import json
import shlex
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from analysis import tables
from analysis.records import Search, Sweep, plain
from analysis.tables import Table
from dino_lab.core import records as names

FORESTS = 5
"""Seeds of the forests that fANOVA is fitted with."""
LEAST_TRIALS = 10
"""Complete trials under which there is no importance: the best tenth would be none."""
SEEDED = "°"
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "RUNNING": "running", "FAIL": "failed"}
"""Optuna's states as they are shown, in the order of the table."""
_REFUSED = "refused"


def asked(sweep: Sweep) -> Search:
    """What the search was asked for."""
    assert sweep.search
    return sweep.search


def distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    """Everything that may be suggested, by name."""
    return {name: json_to_distribution(json.dumps(each)) for name, each in asked(sweep).space.items()}


def points(sweep: Sweep) -> pd.DataFrame:
    """By trial: its outcome, what Optuna was told of each objective, and what was suggested for each name.

    The outcome is the verdict of a complete trial, or diverged; of others it is pruned, running or failed.
    """
    trials, search = sweep.trials, asked(sweep)
    outcome = trials["verdict"].where(trials["state"] != "diverged", "diverged")
    outcome = outcome.where(trials["search_state"] == "COMPLETE", trials["search_state"].map(_STATES))
    told = pd.DataFrame({objective: trials[f"told:{objective}"] for objective in search.objectives})
    # As objects, or whole numbers that are suggested only sometimes would come back with a point.
    suggested = pd.DataFrame(
        [json.loads(each) for each in trials["suggested"]], index=trials.index, columns=list(search.space), dtype=object
    )
    return pd.concat([outcome.rename("outcome"), told, suggested], axis="columns")


def cost(value: Any, objective: str) -> Any:
    """The value, or the negative of one that is better higher: the less, the better."""
    return -value if names.metric(objective).better == "higher" else value


def study(sweep: Sweep) -> optuna.Study:
    """The study as Optuna had it, in memory; its trials are numbered as the frame's rows."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search, known = asked(sweep), distributions(sweep)
    made = optuna.create_study(
        directions=["maximize" if cost(1, each) < 0 else "minimize" for each in search.objectives]
    )
    for trial in sweep.trials.to_dict("records"):
        params = json.loads(trial["suggested"])
        told = [trial[f"told:{objective}"] for objective in search.objectives]
        made.add_trial(
            create_trial(
                state=TrialState[trial["search_state"]],
                params=params,
                distributions={name: known[name] for name in params},
                values=None if any(map(np.isnan, told)) else told,
            )
        )
    return made


# -------------------------------------------------------------------------------------------------------- importance


def importance(sweep: Sweep) -> pd.DataFrame:
    """By objective and name: fANOVA's share, mean, least and greatest over forests, and PED-ANOVA's; each sums to 1.

    fANOVA: the part of the objective's variance over the whole space that a knob explains. PED-ANOVA: how far its
    values in the best tenth of trials are from those in all. fANOVA does not know what is suggested only sometimes.
    All is missing under `LEAST_TRIALS` complete trials, or where the objective is the same in all of them.

    Source: Hutter et al., ICML 2014; Watanabe et al., arXiv:2304.10255; both as Optuna has them.
    """
    made, search = study(sweep), asked(sweep)
    complete = made.get_trials(states=[TrialState.COMPLETE])
    known = [name for name in search.space if any(name in trial.params for trial in complete)]
    always = [name for name in known if all(name in trial.params for trial in complete)]
    parts = {}
    for index, objective in enumerate(search.objectives):
        table = pd.DataFrame(np.nan, index=list(search.space), columns=["fanova", "least", "greatest", "ped_anova"])
        parts[objective] = table
        if len(complete) < LEAST_TRIALS or len({trial.values[index] for trial in complete}) == 1:
            continue

        def target(trial: FrozenTrial, index: int = index, objective: str = objective) -> float:
            return float(cost(trial.values[index], objective))

        with warnings.catch_warnings():
            # Optuna reminds that a target is to be low, as it is here, and of levels with few trials.
            warnings.simplefilter("ignore")
            evaluator = PedAnovaImportanceEvaluator()
            shares = get_param_importances(made, evaluator=evaluator, params=known, target=target)
            forests = pd.DataFrame(
                get_param_importances(
                    made, evaluator=FanovaImportanceEvaluator(seed=seed), params=always, target=target
                )
                for seed in range(FORESTS)
            )
        table["fanova"], table["least"], table["greatest"] = forests.mean(), forests.min(), forests.max()
        table["ped_anova"] = pd.Series(shares)
    return pd.concat(parts, names=["objective", "knob"])


def by_importance(shares: pd.DataFrame) -> list[str]:
    """Names, the most important for the first objective first: by fANOVA, then those that only PED-ANOVA knows."""
    first = shares.loc[shares.index[0][0]]
    order = first[["fanova", "ped_anova"]].fillna(-1)
    return list(order.sort_values(["fanova", "ped_anova"], ascending=False, kind="stable").index)


def importance_table(sweep: Sweep, shares: pd.DataFrame) -> Table:
    """Importance as people read it."""
    search, short = asked(sweep), short_names(sweep)
    table = shares.loc[[(objective, name) for objective in search.objectives for name in by_importance(shares)]]
    cells = pd.DataFrame(index=table.index)
    cells["fANOVA"] = [
        "" if pd.isna(mean) else f"{mean:.2f} ({least:.2f}–{greatest:.2f})"
        for mean, least, greatest in table[["fanova", "least", "greatest"]].itertuples(index=False)
    ]
    cells["PED-ANOVA"] = ["" if pd.isna(share) else f"{share:.2f}" for share in table["ped_anova"]]
    several = len(search.objectives) > 1
    cells.index = pd.Index(
        [short[name] + (f", {label(objective)}" if several else "") for objective, name in table.index]
    )
    complete = int((sweep.trials["search_state"] == "COMPLETE").sum())
    notes = [
        f"Shares over {complete} complete trials; a collapse counts with its bad value. fANOVA: of the variance over"
        f" the whole space, mean (least–greatest) of {FORESTS} forests. PED-ANOVA: how far the values of the best tenth"
        " of trials are from those of all. These are two questions, with two answers."
    ]
    if complete < LEAST_TRIALS:
        notes.append(f"There are none under {LEAST_TRIALS} complete trials.")
    elif table["fanova"].isna().any():
        notes.append("fANOVA does not know what is suggested only sometimes.")
    return Table(cells, {}, notes, references=0)


# ------------------------------------------------------------------------------------------------------- best trials


def ranked(sweep: Sweep) -> pd.DataFrame:
    """The trials, best first, with a column that says which are: those that no other is better than in everything.

    The others by the first objective, complete ones before those that were pruned, run, or failed.
    """
    best = {trial.number for trial in study(sweep).best_trials}
    objective = asked(sweep).objectives[0]
    trials = sweep.trials.assign(best=[number in best for number in range(len(sweep.trials))])
    order = pd.DataFrame(
        {
            "state": trials["search_state"].map([*_STATES].index),
            "beaten": ~trials["best"],
            "cost": cost(trials[f"told:{objective}"], objective),
            "number": trials["row_index"],
        }
    )
    return trials.loc[order.sort_values([*order.columns]).index]


def changes(sweep: Sweep, trial: Mapping[Any, Any]) -> dict[str, Any]:
    """The knobs that make a trial's settings of the baseline's, but for whether its collapse ends it."""
    return {**asked(sweep).fixed, **sweep.overrides, **json.loads(trial["changes"])}


def flags(sweep: Sweep, trial: Mapping[Any, Any]) -> str:
    """The same as options of a command."""
    knobs = [f"--set {shlex.quote(f'{knob}={plain(value)}')}" for knob, value in changes(sweep, trial).items()]
    return " ".join([f"--baseline {sweep.baseline}", *knobs])


def snippet(sweep: Sweep, trial: Mapping[Any, Any]) -> str:
    """The same as a baseline in Python."""
    knobs = [f"        {_literal(knob)}: {_literal(value)}," for knob, value in changes(sweep, trial).items()]
    made = [f"BASELINE = BASELINES[{_literal(sweep.baseline)}].but(", "    {", *knobs, "    }", ")"]
    return "\n".join(["from experiments.baselines import BASELINES", "", *made])


# --------------------------------------------------------------------------------------------------------- all trials


def trials(sweep: Sweep) -> pd.DataFrame:
    """Every trial by its number, best first, with what Optuna was told and suggested; at the foot what was refused."""
    search = asked(sweep)
    shown = ["row", "trial_id", "search_state", "state", "verdict", "onset_step", "seeded", "best"]
    table = ranked(sweep)[shown].join(points(sweep).drop(columns="outcome"))
    refused = [
        {
            "row": each["row"],
            "search_state": "FAIL",
            "state": _REFUSED,
            "seeded": False,
            "best": False,
            **each["suggested"],
        }
        for each in search.refused
    ]
    table = pd.concat([table, pd.DataFrame(refused, columns=table.columns)]) if refused else table
    return table.infer_objects().set_axis(pd.Index(table["row"].str.partition(" ")[0], name="trial"))


def trials_table(sweep: Sweep) -> Table:
    """The same as people read it."""
    table, search = trials(sweep), asked(sweep)
    best = [place for place, is_best in enumerate(table["best"]) if is_best]
    cells = pd.DataFrame(index=table.index)
    for objective in search.objectives:
        texts = [_number(value, tables.digits(table[objective])) for value in table[objective]]
        pruned = table["search_state"] == "PRUNED"
        cells[label(objective)] = [f"({t})" if p and t else t for t, p in zip(texts, pruned, strict=True)]
    cells["state"] = table["search_state"].map(_STATES).where(table["state"] != _REFUSED, _REFUSED)
    cells["verdict"] = table["verdict"].where(table["state"] != "diverged", "diverged").fillna("")
    cells["onset, step"] = ["" if pd.isna(step) else f"{step:.0f}" for step in table["onset_step"]]
    for name, short in short_names(sweep).items():
        cells[short] = [_value(value) for value in table[name]]
    marks = {
        tables.COLLAPSED: table["verdict"].isin(names.COLLAPSES),
        tables.DIVERGED: table["state"] == "diverged",
        tables.STOPPED: table["state"] == "stopped",
        SEEDED: table["seeded"].astype(bool),
    }
    cells.index = pd.Index(
        [
            number + "".join(f" {mark}" for mark, has in marks.items() if has.iloc[place])
            for place, number in enumerate(table.index)
        ]
    )
    return Table(cells, {label(objective): best for objective in search.objectives}, _notes(sweep, marks), references=0)


def outcome_line(sweep: Sweep) -> str:
    """How many trials ended how."""
    states, outcomes = sweep.trials["search_state"].value_counts(), points(sweep)["outcome"]
    complete = {"collapsed": outcomes.isin(names.COLLAPSES).sum(), "diverged": (outcomes == "diverged").sum()}
    inner = [f"{number} {word}" for word, number in complete.items() if number]
    parts = [
        f"{states.get('COMPLETE', 0)} of {len(sweep.trials)} trials complete"
        + (f" ({', '.join(inner)})" if inner else "")
    ]
    parts += [f"{states[state]} {word}" for state, word in _STATES.items() if state in states and state != "COMPLETE"]
    if asked(sweep).refused_number:
        parts.append(f"{asked(sweep).refused_number} more suggestions refused")
    return ", ".join(parts) + "."


def label(objective: str) -> str:
    """How a table calls an objective."""
    short = dict(tables.EVALUATIONS.values()).get(objective)
    return short or f"{objective}, {names.metric(objective).unit}"


def short_names(sweep: Sweep) -> dict[str, str]:
    """Names without their sections where that tells them apart."""
    whole = [*asked(sweep).space]
    last = []
    for name in whole:
        knob, bracket, level = name.partition(" (")
        last.append(knob.rpartition(".")[2] + bracket + level)
    return {name: short if last.count(short) == 1 else name for name, short in zip(whole, last, strict=True)}


def _notes(sweep: Sweep, marks: Mapping[str, "pd.Series[bool]"]) -> list[str]:
    search = asked(sweep)
    options = search.options
    budget = [f"{options[unit]:g} {unit}" for unit in ("trials", "hours") if options[unit]]
    pruner = "" if options["pruner"] == "none" else f", pruned by {options['pruner']}"
    fixed = "".join(f", {knob}={plain(value)}" for knob, value in search.fixed.items())
    notes = [
        f"{sweep.title}{fixed}. Sampler {options['sampler']}{pruner}; {' or '.join(budget) or 'every point'}; seed"
        f" {options['seed']}. Best first; bold: "
        + ("no other is better in everything." if len(search.objectives) > 1 else "the best.")
        + " In brackets: of the step at which a trial was pruned. One seed each, so that the best of many is too high."
    ]
    said = {
        tables.COLLAPSED: "collapsed",
        tables.DIVERGED: "diverged, and counts with the worst value there is",
        tables.STOPPED: "stopped for its collapse: higher is better, so the value is that of its last step; lower is"
        " better, so it is the worst that any trial had",
        SEEDED: "taken over from another experiment",
    }
    present = [f"{mark} {meaning}" for mark, meaning in said.items() if marks[mark].any()]
    if present:
        notes.append("; ".join(present) + ".")
    if search.refused_number:
        notes.append(f"Refused: {search.refused_number}; the first: {search.refused[0]['error']}.")
    return notes


def _literal(value: Any) -> str:
    """As it is written in Python."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _number(value: float, digits: int) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def _value(value: Any) -> str:
    """A suggested value, in three digits; empty where none was suggested."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3g}"
    return plain(value)
