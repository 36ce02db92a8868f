"""Explanations of trial folders with handmade journals, and diagnoses of logs that others wrote."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dino_lab import explaining, terminal
from dino_lab.core import records
from dino_lab.core.records import Record
from dino_lab.core.trial import Trial
from dino_lab.explaining import Diagnosis, Evidence, Explanation, Past
from dino_lab.lint import lint
from dino_lab.orchestration.folder import End, TrialFolder, locked

K = 128
PERIOD = 10
PER_EPOCH = 100
STEPS = 300
"""Of the run: the smoke baseline has three epochs."""

# (teacher entropy, mutual information, KL), as fractions of ln K
State = tuple[float, float, float]
HEALTHY = (0.3, 0.6, 0.2)
UNIFORM = (0.995, 0.0005, 0.01)
MORE_UNIFORM = (1.0, 0.0, 0.0)
ONE_PROTOTYPE = (0.001, 0.0, 0.0005)
SAME = (0.5, 0.005, 0.3)
FEW = (0.001, 0.1, 0.001)


def values(state: State) -> dict[str, float]:
    entropy, information, kl = (fraction * math.log(K) for fraction in state)
    return {
        records.LOSS: entropy + kl,
        records.TEACHER_ENTROPY: entropy,
        records.KL: kl,
        records.MUTUAL_INFORMATION: information,
        records.PROTOTYPES_NUMBER: float(K),
    }


def journal(*shown: State | dict[str, float], verdict: str = "none") -> list[Record]:
    """The untrained network, then a record every ten steps."""
    start = Record(0, 0.0, 1e9, {records.KNN: 35.0})
    of_steps = [each if isinstance(each, dict) else values(each) for each in shown]
    return [start] + [
        Record(PERIOD * i, PERIOD * i / PER_EPOCH, 1e9 + i, each, verdict) for i, each in enumerate(of_steps, start=1)
    ]


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    return tmp_path / "lab"


def written(trial: Trial, lab: Path, of_trial: list[Record], end: End | None = None) -> TrialFolder:
    folder = TrialFolder(lab, trial.identity)
    folder.begin(trial)
    for record in of_trial:
        folder.append(record)
    if end:
        folder.write_end(end.state, end.error, seconds=end.seconds)
    return folder


def explained(trial: Trial, lab: Path, of_trial: list[Record], end: End | None = None) -> Explanation:
    written(trial, lab, of_trial, end)
    return explaining.explain(trial.identity, lab)[0]


FINISHED = End("finished", None, 60.0, 0)


def test_a_collapse_has_a_name_a_date_and_evidence_at_its_onset_and_at_the_end(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, journal(*[HEALTHY] * 5, *[UNIFORM] * 24, MORE_UNIFORM), FINISHED)
    assert (said.kind, said.onset_step, said.steps) == ("uniform", 60, STEPS)
    assert (said.onset_epoch, said.onset_percent) == pytest.approx((0.6, 20.0))
    assert said.title == "uniform from step 60 (epoch 0.60, 20 %)"
    assert said.evidence == (
        Evidence("teacher entropy / ln K", ">=", 0.99, 60, pytest.approx(0.995), 300, pytest.approx(1.0)),
        Evidence("KL / ln K", "<=", 0.02, 60, pytest.approx(0.01), 300, pytest.approx(0.0)),
    )


def test_percents_are_of_the_whole_run_also_where_it_is_not_at_its_end(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, journal(*[HEALTHY] * 5, *[UNIFORM] * 6))
    assert (said.state, said.step, said.steps, said.onset_percent) == ("interrupted", 110, STEPS, pytest.approx(20.0))


def test_the_bounds_are_those_of_the_trial(smoke: Trial, lab: Path) -> None:
    shown = journal(*[HEALTHY] * 5, *[UNIFORM] * 20)
    assert explained(smoke.but({"collapse.uniform_entropy": 0.999}), lab, shown).kind == "constant"
    assert explained(smoke.but({"collapse.certain_fraction": 0.9}), lab, shown).kind == "none"


def test_no_collapse_needs_no_evidence_and_no_advice(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, journal(*[HEALTHY] * 30), FINISHED)
    assert (said.kind, said.onset_step, said.onset_percent, said.evidence, said.advice, said.left) == (
        "none",
        None,
        None,
        (),
        (),
        (),
    )
    assert said.title == "no collapse"


def test_a_collapse_that_was_left_is_told_and_advised_on(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, journal(*[HEALTHY] * 5, *[ONE_PROTOTYPE] * 10, *[HEALTHY] * 15), FINISHED)
    assert (said.kind, said.left) == ("none", (Past("one_prototype", 60, 160),))
    assert [advice.what for advice in said.advice] == ["let the centre be that of the last batch"]


@pytest.mark.parametrize(
    ("changes", "state", "what"),
    [
        ({"method.loss.sharpening": False}, UNIFORM, "turn sharpening on"),
        ({"method.loss.teacher_temp": 0.1}, UNIFORM, "start the teacher at 0.04; warm it up to 0.07 at most"),
        ({"method.operation.kind": "none"}, ONE_PROTOTYPE, "turn centring on"),
        # a centre that follows a hundred steps behind, of three hundred
        ({"method.operation.center_momentum": 0.99}, ONE_PROTOTYPE, "let the centre follow: 0.9"),
        ({"method.teacher.kind": "student_copy"}, SAME, "make the teacher a moving average of the student"),
    ],
)
def test_advice_follows_from_the_kind_and_the_settings(
    smoke: Trial, lab: Path, changes: dict[str, str | float | bool], state: State, what: str
) -> None:
    said = explained(smoke.but(changes), lab, journal(*[HEALTHY] * 5, *[state] * 25), FINISHED)
    assert any(advice.what.startswith(what) for advice in said.advice)


def test_the_linter_is_asked_with_the_images_that_were_trained_on(smoke: Trial, lab: Path) -> None:
    trial = smoke.but({"method.loss.sharpening": False})
    folder = written(trial, lab, journal(HEALTHY))
    assert explaining.explain(trial.identity, lab)[0].findings == tuple(lint(trial, train_images=32))
    folder.data.write_text(json.dumps({"training": {"images": 1000}}))
    said = explaining.explain(trial.identity, lab)[0]
    assert said.findings == tuple(lint(trial, train_images=1000)) != tuple(lint(trial, train_images=32))
    assert "no_sharpening" in {finding.rule for finding in said.findings}


def test_a_trial_that_diverged_did_so_at_its_last_record(smoke: Trial, lab: Path) -> None:
    broken = Record(57, 0.57, 1e9, {}, "diverged", 57)
    end = End("diverged", "the loss of step 57 is not finite", 9.0, 0)
    said = explained(smoke.but({"optimizer.clip_grad": 0.0}), lab, [*journal(*[HEALTHY] * 5), broken], end)
    assert (said.state, said.kind, said.onset_step, said.error) == ("diverged", "diverged", 57, end.error)
    assert said.title == "diverged from step 57 (epoch 0.57, 19 %)"
    assert "clip gradients at 3, or 0.3 for larger networks" in [advice.what for advice in said.advice]


GEOMETRY = {records.EMBEDDING_RANK: 10.0, records.EMBEDDING_STD: 0.5}


def test_a_trial_that_has_not_started_shows_how_little_has_moved(smoke: Trial, lab: Path) -> None:
    shown = [values(HEALTHY) | GEOMETRY] * 29 + [values(HEALTHY) | {**GEOMETRY, records.EMBEDDING_STD: 0.45}]
    said = explained(smoke.but({"optimizer.lr": 1e-7}), lab, journal(*shown), FINISHED)
    assert (said.kind, said.onset_step) == ("not_started", 10)
    assert said.evidence == (
        Evidence(f"change of {records.EMBEDDING_RANK}", "<=", 0.3, 10, 0.0, 300, 0.0),
        Evidence(f"change of {records.EMBEDDING_STD}", "<=", 0.3, 10, 0.0, 300, pytest.approx(0.1)),
    )
    assert [advice.what.split(" until")[0] for advice in said.advice] == ["raise optimizer.lr"]


def test_targets_that_were_flat_from_the_start_are_evidence_too(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, journal(*[UNIFORM] * 30), FINISHED)
    assert said.kind == "not_started"
    assert said.evidence == (
        Evidence("teacher entropy / ln K", ">=", 0.99, 10, pytest.approx(0.995), 300, pytest.approx(0.995)),
    )


def test_what_has_moved_is_no_evidence_that_nothing_has(smoke: Trial, lab: Path) -> None:
    moves = [values(UNIFORM) | {**GEOMETRY, records.EMBEDDING_RANK: 10.0 + 5 * i} for i in range(30)]
    said = explained(smoke, lab, journal(*moves), FINISHED)
    assert said.kind == "not_started"
    assert [each.signal for each in said.evidence] == ["teacher entropy / ln K"]


def test_evidence_is_of_the_collapse_and_not_of_what_looked_like_it_before(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, journal(*[HEALTHY] * 3, *[UNIFORM] * 2, *[HEALTHY] * 3, *[UNIFORM] * 22), FINISHED)
    assert said.onset_step == 90
    assert {each.onset_step for each in said.evidence} == {90}


def test_what_a_collapse_looked_like_at_first_is_told_where_that_was_something_else(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, journal(*[HEALTHY] * 5, *[SAME] * 3, *[UNIFORM] * 22), FINISHED)
    assert (said.kind, said.onset_step, said.first_sign) == ("uniform", 90, ("constant", 60))
    assert "  its first sign was of constant, at step 60" in terminal.explained_lines(said)
    wandered = explained(
        smoke.but({"seed": 1}), lab, journal(*[HEALTHY] * 5, *[ONE_PROTOTYPE] * 9, *[SAME] * 16), FINISHED
    )
    assert (wandered.kind, wandered.onset_step, wandered.first_sign) == ("constant", 60, ("one_prototype", 60))
    assert {each.onset_step for each in wandered.evidence} == {150}  # where it was not on one prototype any more
    back = explained(
        smoke.but({"seed": 3}), lab, journal(*[ONE_PROTOTYPE] * 5, *[FEW] * 5, *[ONE_PROTOTYPE] * 20), FINISHED
    )
    assert (back.kind, back.onset_step, back.first_sign) == ("one_prototype", 110, ("one_prototype", 10))
    alike = explained(smoke.but({"seed": 2}), lab, journal(*[HEALTHY] * 5, *[UNIFORM] * 25), FINISHED)
    assert alike.first_sign is None
    assert not any("first sign" in line for line in terminal.explained_lines(alike))


def test_a_journal_that_was_judged_by_other_bounds_is_told(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, journal(*[HEALTHY] * 5, *[UNIFORM] * 25, verdict="constant"), FINISHED)
    assert (said.kind, said.recorded) == ("uniform", "constant")
    assert "  its journal has constant, by the bounds and rules of its day" in terminal.explained_lines(said)
    same = replace(said, recorded="uniform")
    assert not any("its journal has" in line for line in terminal.explained_lines(same))


def test_how_it_ended_is_told(smoke: Trial, lab: Path) -> None:
    failed = End("failed", "Traceback\n  File\nMemoryError: too large\n", 3.0, 0)
    said = explained(smoke, lab, journal(HEALTHY, HEALTHY), failed)
    lines = terminal.explained_lines(said)
    assert "  failed after 20 steps of 300, 3 records" in lines
    assert "  MemoryError: too large" in lines
    assert explained(smoke, lab, [], End("stopped", None, 3.0, 0)).state == "stopped"
    with locked(TrialFolder(lab, smoke.identity).lock, patience_seconds=0, busy="", doing="held"):
        written(smoke, lab, [])
        assert explaining.explain(smoke.identity, lab)[0].state == "running"


def test_a_trial_without_records_is_explained_as_far_as_it_is_known(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, [])
    assert (said.state, said.records, said.step, said.steps, said.kind, said.knn) == (
        "interrupted",
        0,
        0,
        None,
        "none",
        None,
    )


def test_the_first_and_the_last_evaluation_are_told(smoke: Trial, lab: Path) -> None:
    said = explained(smoke, lab, journal(HEALTHY, values(HEALTHY) | {records.KNN: 50.0}, HEALTHY))
    assert said.knn == (35.0, 50.0)


def test_an_unknown_trial_names_those_that_are_there(smoke: Trial, lab: Path) -> None:
    written(smoke, lab, [])
    with pytest.raises(ValueError, match=f"unknown trial 'nosuch'; .*{smoke.identity}"):
        explaining.explain("nosuch", lab)


def test_the_folder_is_not_written_to(smoke: Trial, lab: Path) -> None:
    folder = written(smoke, lab, journal(*[HEALTHY] * 5, *[UNIFORM] * 25), FINISHED)
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    explaining.explain(smoke.identity, lab)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_all_of_it_is_json(smoke: Trial, lab: Path, tmp_path: Path) -> None:
    said = explained(smoke.but({"method.loss.sharpening": False}), lab, journal(*[HEALTHY] * 5, *[UNIFORM] * 25))
    plain = json.loads(json.dumps(asdict(said), allow_nan=False))
    assert plain["evidence"][0]["at_onset"] == pytest.approx(0.995)
    assert plain["advice"][0]["changes"] == {"method.loss.sharpening": True}
    diagnosis = diagnosed(tmp_path, [9.0] * 5 + [math.log(4096)] * 20)
    assert json.loads(json.dumps(asdict(diagnosis), allow_nan=False))["out_dim"] == 4096


def test_what_is_to_be_typed_can_be_typed(smoke: Trial, lab: Path) -> None:
    for changes, state, typed in [
        ({"method.teacher.kind": "student_copy"}, SAME, "--set method.teacher.kind=momentum"),
        ({"method.loss.sharpening": False}, UNIFORM, "--set method.loss.sharpening=true"),
    ]:
        said = explained(smoke.but(changes), lab, journal(*[HEALTHY] * 5, *[state] * 25))
        assert f"    {typed}" in terminal.explained_lines(said)


# ------------------------------------------------------------------------------------------------- logs of others


def diagnosed(folder: Path, losses: list[float], out_dim: int | None = None) -> Diagnosis:
    file = folder / "log.csv"
    file.write_text("step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in enumerate(losses)))
    return explaining.diagnose(file, out_dim=out_dim)[0]


def said_of(parts: tuple[str, ...]) -> str:
    return "\n".join(parts)


def test_a_guess_is_said_to_be_one(tmp_path: Path) -> None:
    said = diagnosed(tmp_path, [9.0] * 5 + [8.3178] * 95)
    assert (said.kind, said.onset_step, said.out_dim, said.out_dim_is) == ("uniform", 5, 4096, "a guess")
    assert "K = 4,096 is a guess" in said_of(said.notes)
    assert "within 0.005 nats of ln 4,096 = 8.3178" in said_of(said.notes)
    assert any("K = 4,096 (a guess)" in line for line in terminal.explained_lines(said))


def test_a_k_that_the_plateau_speaks_against_is_questioned(tmp_path: Path) -> None:
    # facebookresearch/dinov2#407, asked with the reference's K
    said = diagnosed(tmp_path, [9.0] * 5 + [8.3178] * 95, out_dim=65536)
    assert (said.kind, said.out_dim_is) == ("none", "asked for")
    assert "of ln 4,096 = 8.3178, and not at ln 65,536 = 11.0904: is K = 65,536 right?" in said_of(said.notes)
    assert not diagnosed(tmp_path, [9.0] * 5 + [8.3178] * 95, out_dim=4096).notes


def test_a_loss_at_ln_k_from_the_first_record_on_may_be_one_that_never_began(tmp_path: Path) -> None:
    from_first = diagnosed(tmp_path, [11.0902] * 60)
    assert from_first.kind == "uniform"
    assert "a student that has not begun is there as well" in said_of(from_first.unknown)
    later = diagnosed(tmp_path, [9.0] * 5 + [11.0902] * 60)
    assert later.kind == "uniform"
    assert "has not begun" not in said_of(later.unknown)
    assert "log teacher entropy and KL apart" in said_of(later.unknown)


def test_what_a_loss_alone_cannot_tell_depends_on_what_it_looks_like(tmp_path: Path) -> None:
    low = diagnosed(tmp_path, [8.0] * 5 + [0.05] * 20)
    assert low.kind == "one_prototype"
    assert "on two or three, or on one for each image" in said_of(low.unknown)
    assert "compared with the highest" in said_of(low.notes)
    healthy = diagnosed(tmp_path, [9.0 - i / 10 for i in range(50)])
    assert "same for all images but wander" in said_of(healthy.unknown)
    assert "near ln K, without K" in said_of(healthy.unknown)
    assert not healthy.advice
    still = diagnosed(tmp_path, [5.0] * 20)
    assert (still.kind, still.onset_percent) == ("not_started", 0)
    assert still.evidence[0].at_end == 0
    assert still.unknown


def targets_log(folder: Path, states: list[State], columns: str = "step,teacher_entropy,mutual_information,kl") -> Path:
    file = folder / "log.csv"
    rows = [[10 * i, *(part * math.log(K) for part in state)] for i, state in enumerate(states)]
    file.write_text("\n".join([columns, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return file


def test_a_log_with_targets_is_judged_as_a_trial_is(tmp_path: Path) -> None:
    said, shown = explaining.diagnose(targets_log(tmp_path, [HEALTHY] * 10 + [SAME] * 90), out_dim=K)
    assert (said.judged_by, said.kind, said.onset_step, said.unknown) == ("targets", "constant", 100, ())
    assert said.evidence == (
        Evidence("mutual information / ln K", "<=", 0.01, 100, pytest.approx(0.005), 990, pytest.approx(0.005)),
    )
    assert shown[0].values[records.PROTOTYPES_NUMBER] == K
    short, _ = explaining.diagnose(targets_log(tmp_path, [HEALTHY] * 96 + [SAME] * 4), out_dim=K)
    assert short.kind == "none"  # for less than a twentieth


def test_a_log_with_targets_but_without_k_or_information_is_judged_by_its_loss(tmp_path: Path) -> None:
    states = [HEALTHY] * 10 + [SAME] * 90
    assert explaining.diagnose(targets_log(tmp_path, states))[0].judged_by == "loss"
    file = targets_log(tmp_path, states, "step,teacher_entropy,other,kl")
    assert explaining.diagnose(file, out_dim=K)[0].judged_by == "loss"


def test_k_may_stand_in_the_log(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text("step,loss,out_dim\n" + "".join(f"{i},{math.log(128)},128\n" for i in range(10)))
    said, _ = explaining.diagnose(file)
    assert (said.out_dim, said.out_dim_is, said.kind) == (128, "in the log", "uniform")
    file.write_text("step,loss,out_dim\n0,1.0,1\n")
    with pytest.raises(ValueError, match="K = 1: must be 2 or more"):
        explaining.diagnose(file)


def test_entropies_that_are_more_than_ln_k_are_questioned(tmp_path: Path) -> None:
    bits = [(*(part / math.log(2) for part in HEALTHY[:2]), 0.1), (1 / math.log(2), 0.0, 0.0)]
    said, _ = explaining.diagnose(targets_log(tmp_path, bits * 5), out_dim=K)
    assert "exceeds ln 128: it must be in nats, and K right" in said_of(said.notes)


@pytest.mark.parametrize("column", ["total_loss", "dino_global_crops_loss"])
def test_what_is_not_finite_is_told_by_its_column(tmp_path: Path, column: str) -> None:
    row = {"dino_local_crops_loss": 10.5, "dino_global_crops_loss": 1.31, "total_loss": 15.0, column: math.inf}
    file = tmp_path / "training_metrics.json"
    file.write_text("".join(json.dumps({"iteration": i} | row) + "\n" for i in range(0, 60, 10)))
    said, _ = explaining.diagnose(file)
    assert (said.kind, said.onset_step) == ("diverged", 0)
    assert f"not finite: {column} = inf, from iteration 0 to 50" in said_of(said.notes)
    assert ("KoLeo" in said_of(said.notes).partition("not finite")[2]) == (column == "total_loss")


def test_what_is_read_and_what_is_not_is_told(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text("".join(json.dumps({"train_loss": 9.0 - i, "train_wd": 0.1, "epoch": i}) + "\n" for i in range(5)))
    lines = terminal.explained_lines(explaining.diagnose(file)[0])
    assert lines[-2:] == ["read: train_loss as train/loss, epoch as epoch", "not used: train_wd"]
