"""explain and diagnose: what is said of a trial by its folder alone, and of logs that others wrote."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from dino_lab.core import records
from dino_lab.core.records import COLLAPSES, VERDICTS, Record
from dino_lab.core.trial import Trial
from dino_lab.explaining import Explanation, diagnose, diagnosis_lines, explain, explanation_lines
from dino_lab.orchestration.folder import End, TrialFolder

K = 128
# (teacher entropy, mutual information, KL), as fractions of ln K
HEALTHY, UNIFORM, ONE_PROTOTYPE = (0.3, 0.6, 0.2), (0.999, 0.0005, 0.001), (0.001, 0.0, 0.0005)
GEOMETRY = (records.EMBEDDING_RANK, records.EMBEDDING_STD, records.OUTPUT_RANK, records.OUTPUT_STD)


def shown(step: int, state: tuple[float, float, float], *, geometry: float = 1.0) -> Record:
    entropy, information, kl = (fraction * math.log(K) for fraction in state)
    values = {
        records.LOSS: entropy + kl,
        records.TEACHER_ENTROPY: entropy,
        records.KL: kl,
        records.MUTUAL_INFORMATION: information,
        records.PROTOTYPES_NUMBER: float(K),
        **dict.fromkeys(GEOMETRY, 8 * geometry),
    }
    return Record(step, step / 100, 0.0, values)


def journal(lab: Path, trial: Trial, made: list[Record], end: End | None = None) -> str:
    folder = TrialFolder(lab, trial.identity)
    folder.begin(trial)
    for record in made:
        folder.append(record)
    if end:
        folder.write_end(end)
    return trial.identity


@pytest.fixture
def trial(smoke: Trial) -> Trial:
    """Three epochs of a hundred steps each, by its records."""
    return smoke


def collapsed(lab: Path, trial: Trial) -> Explanation:
    made = [Record(0, 0.0, 0.0, {records.KNN: 30.0})]
    made += [shown(step, HEALTHY, geometry=1.0) for step in range(10, 60, 10)]
    made += [shown(step, UNIFORM, geometry=0.5) for step in range(60, 301, 10)]
    made[-1] = dataclasses.replace(made[-1], values=made[-1].values | {records.KNN: 25.0}, verdict="uniform")
    said, drawn = explain(journal(lab, trial, made, End("finished", None, 1.0)), lab)
    assert drawn == made
    return said


def test_a_collapse_is_told_with_its_date_and_what_crossed_which_bound(trial: Trial, tmp_path: Path) -> None:
    said = collapsed(tmp_path, trial)
    assert (said.kind, said.onset_step, said.onset_epoch, said.onset_percent) == ("uniform", 60, 0.6, 20)
    assert (said.state, said.step, said.steps, said.records) == ("finished", 300, 300, 31)
    assert said.knn == (30.0, 25.0)
    entropy, kl = said.evidence
    assert str(entropy) == "teacher entropy / ln K >= 0.98: 0.999 at 60, 0.999 at 300"
    assert str(kl) == "KL / ln K <= 0.02: 0.001 at 60, 0.001 at 300"


def test_what_to_try_is_for_the_settings_at_hand(trial: Trial, tmp_path: Path) -> None:
    plain = collapsed(tmp_path, trial)
    no_sharpening = collapsed(tmp_path, trial.but({"method.loss.sharpening": False}))
    hot = collapsed(tmp_path, trial.but({"method.loss.teacher_temp": 0.1, "method.loss.warmup_teacher_temp_epochs": 0}))
    assert "turn sharpening on" in [each.what for each in no_sharpening.advice]
    assert {"method.loss.sharpening": True} in [each.changes for each in no_sharpening.advice]
    assert "no_sharpening" in [each.rule for each in no_sharpening.findings]
    assert any(each.what.startswith("start the teacher at 0.04") for each in hot.advice)
    assert "turn sharpening on" not in [each.what for each in (*plain.advice, *hot.advice)]
    assert all(each.source for each in (*plain.advice, *hot.advice, *no_sharpening.advice))


@pytest.mark.parametrize("kind", [*COLLAPSES, "diverged", "not_started"])
def test_something_is_known_to_try_against_every_kind(kind: str, smoke: Trial) -> None:
    from dino_lab.advice import advice_against

    assert advice_against([kind])
    for changes in advice_against([kind], smoke):
        smoke.but(changes.changes)


def test_what_was_left_stays_told(trial: Trial, tmp_path: Path) -> None:
    made = [shown(10, HEALTHY)] + [shown(step, ONE_PROTOTYPE, geometry=0.5) for step in range(20, 101, 10)]
    made += [shown(step, HEALTHY, geometry=0.5) for step in range(110, 301, 10)]
    said, _ = explain(journal(tmp_path, trial, made), tmp_path)
    assert said.kind == "none"
    (past,) = said.left
    assert (past.kind, past.first_step, past.last_step) == ("one_prototype", 20, 110)
    assert "  was one_prototype from step 20 to 110, and left it" in explanation_lines(said)
    assert said.state == "interrupted"


def test_a_trial_that_stands_still_is_told_with_how_far_it_went(trial: Trial, tmp_path: Path) -> None:
    made = [shown(step, HEALTHY, geometry=1 + step / 2000) for step in range(10, 301, 10)]
    said, _ = explain(journal(tmp_path, trial.but({"optimizer.lr": 1e-9}), made), tmp_path)
    assert said.kind == "not_started"
    assert {each.bound for each in said.evidence} == {0.3}
    assert said.evidence[0].at_end == pytest.approx(1.15 / 1.005 - 1)
    assert any("optimizer.lr" in each.what for each in said.advice)


def test_a_diverged_trial_is_told_so_by_how_it_ended(trial: Trial, tmp_path: Path) -> None:
    made = [shown(10, HEALTHY), Record(15, 0.15, 0.0, {}, "diverged", 15)]
    end = End("diverged", "the loss of step 15 is not finite", 1.0)
    said, _ = explain(journal(tmp_path, trial, made, end), tmp_path)
    assert (said.kind, said.onset_step) == ("diverged", 15)
    assert "  the loss of step 15 is not finite" in explanation_lines(said)
    assert said.advice


def test_a_trial_without_a_record_is_told_as_it_is(trial: Trial, tmp_path: Path) -> None:
    said, drawn = explain(journal(tmp_path, trial, []), tmp_path)
    assert (said.kind, said.steps, said.records, drawn) == ("none", None, 0, [])
    assert explanation_lines(said)[0].endswith(VERDICTS["none"])


def test_a_trial_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trials in"):
        explain("abc", tmp_path)


def test_lines_say_verdict_evidence_linter_and_advice(trial: Trial, tmp_path: Path) -> None:
    said = collapsed(tmp_path, trial.but({"method.operation.kind": "none"}))
    lines = explanation_lines(said)
    assert lines[0] == f"trial {said.trial_id}: uniform from step 60 (epoch 0.60, 20 %)"
    assert f"  {VERDICTS['uniform']}" in lines
    assert "evidence, by step:" in lines
    assert any(line.startswith("  warning no_centering: ") for line in lines)
    assert "what to try:" in lines


# ------------------------------------------------------------------------------------------- what others logged


def test_a_plateau_at_ln_65536_for_sixty_epochs_is_uniform_and_k_a_guess(tmp_path: Path) -> None:
    """facebookresearch/dino#246."""
    log = tmp_path / "log.txt"
    rows = [{"train_loss": 11.0902, "train_lr": 5e-4, "train_wd": 0.04, "epoch": epoch} for epoch in range(60)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said, drawn = diagnose(log)
    assert (said.kind, said.onset_step, said.judged_by) == ("uniform", 0, "loss")
    assert (said.out_dim, said.out_dim_is) == (65536, "a guess")
    assert any("is a guess" in note for note in said.notes)
    assert any("has not begun is there as well" in each for each in said.unknown)
    assert len(drawn) == 60
    known, _ = diagnose(log, out_dim=65536)
    assert known.out_dim_is == "asked for"
    assert not any("guess" in note for note in known.notes)


def test_a_loss_at_ln_4096_is_uniform_for_dinov2_and_dinov3(tmp_path: Path) -> None:
    """facebookresearch/dinov2#407 and dinov3#199: 8.3178."""
    log = tmp_path / "training_metrics.json"
    rows = [
        {
            "iteration": step,
            "total_loss": 9.0,
            "dino_local_crops_loss": 8.3178 * 0.8,
            "dino_global_crops_loss": 8.3178 * 0.2,
            "koleo_loss": 0.7,
            "lr": 1e-3,
        }
        for step in range(0, 3000, 10)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said, _ = diagnose(log)
    assert (said.kind, said.out_dim, said.out_dim_is) == ("uniform", 4096, "a guess")


def test_a_loss_that_falls_from_8_to_0_05_in_an_epoch_is_one_prototype_as_far_as_a_loss_tells(tmp_path: Path) -> None:
    """facebookresearch/dinov2#272."""
    log = tmp_path / "log.csv"
    losses = {step: max(0.05, 8 * math.exp(-step / 150)) for step in range(0, 2000, 10)}
    log.write_text("step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in losses.items()))
    said, _ = diagnose(log)
    assert said.kind == "one_prototype"
    assert losses[said.onset_step] <= 0.05 * 8 < losses[said.onset_step - 10]
    assert any("count the prototypes in use" in each for each in said.unknown)


def test_entropies_in_a_log_are_judged_as_those_of_a_trial(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    rows = [shown(step, HEALTHY if step < 60 else ONE_PROTOTYPE) for step in range(10, 310, 10)]
    names = [records.LOSS, records.TEACHER_ENTROPY, records.KL, records.MUTUAL_INFORMATION]
    lines = [",".join([str(row.step), *(str(row.values[name]) for name in names)]) for row in rows]
    log.write_text("step,loss,teacher_entropy,kl,mutual_information\n" + "\n".join(lines) + "\n")
    said, _ = diagnose(log, out_dim=K)
    assert (said.kind, said.onset_step, said.judged_by) == ("one_prototype", 60, "targets")
    assert said.unknown == ()
    by_loss, _ = diagnose(log)
    assert by_loss.judged_by == "loss"


def test_a_healthy_log_is_none(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    rows = [{"train_loss": 10.9 - 0.079 * epoch, "train_lr": 5e-4, "epoch": epoch} for epoch in range(100)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said, _ = diagnose(log)
    assert (said.kind, said.onset_step, said.advice) == ("none", None, ())
    assert diagnosis_lines(said)[0] == f"{log}: {VERDICTS['none']}"
