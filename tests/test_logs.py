"""Logs of others: the numbers of the threads in which people asked what had happened to them."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from dino_lab import logs
from dino_lab.core import records
from dino_lab.core.methods.losses import cross_entropy

LN = {out_dim: math.log(out_dim) for out_dim in (4096, 65536, 262144)}


def json_lines(path: Path, rows: Iterable[Mapping[str, float]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dino(path: Path, losses: Iterable[float]) -> Path:
    """As main_dino.py writes log.txt."""
    rows = [{"train_loss": loss, "train_lr": 5e-4, "train_wd": 0.04, "epoch": i} for i, loss in enumerate(losses)]
    return json_lines(path / "log.txt", rows)


def dinov2(path: Path, losses: Iterable[float], local_crops: int = 8) -> Path:
    """As DINOv2 writes training_metrics.json, every ten iterations; the same loss for all pairs of crops."""
    rows = []
    for i, loss in enumerate(losses):
        parts = {
            "dino_local_crops_loss": loss * local_crops / (1 + local_crops),
            "dino_global_crops_loss": loss / (1 + local_crops),
            "koleo_loss": 0.3,
            "ibot_loss": 2.81,
        }
        of_run = {"iteration": 10 * i, "iter_time": 0.4, "data_time": 0.01, "lr": 1e-3, "wd": 0.04, "mom": 0.994}
        rows.append(of_run | {"current_batch_size": 64.0, "total_loss": sum(parts.values())} | parts)
    return json_lines(path / "training_metrics.json", rows)


def table(path: Path, header: str, rows: Iterable[Sequence[object]]) -> Path:
    file = path / "metrics.csv"
    file.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return file


def loss_table(path: Path, losses: Iterable[float]) -> Path:
    return table(path, "step,loss", enumerate(losses))


def judged(file: Path, out_dim: int | None = None) -> tuple[str, int | None, int | None]:
    """Kind, onset, and the K that was guessed."""
    log = logs.read(file)
    guess = logs.guessed_out_dim(log.losses)
    verdict = logs.of_loss(log, out_dim or guess)
    return verdict.kind, verdict.onset_step, guess


# ------------------------------------------------------------------------------------------------------ the threads


def test_sixty_epochs_at_ln_65536_are_uniform(tmp_path: Path) -> None:
    # facebookresearch/dino#246
    assert judged(dino(tmp_path, [11.0902] * 60)) == ("uniform", 0, 65536)


def test_a_loss_of_ln_4096_is_uniform_and_its_k_is_guessed(tmp_path: Path) -> None:
    # facebookresearch/dinov2#407, a loss of its own: "it collapses always at the same number"
    falls = [8.9, 8.7, 8.55, 8.45]
    assert judged(loss_table(tmp_path, falls + [8.317765235900879] * 60)) == ("uniform", 4, 4096)


def test_a_loss_that_falls_to_ln_4096_in_dinov3_is_uniform(tmp_path: Path) -> None:
    # facebookresearch/dinov3#199: from 8.38 to 8.3178
    falls = [8.38 + (8.3178 - 8.38) * min(1, i / 20) for i in range(200)]
    rows = [
        {"iteration": 10 * i, "lr": 8e-4, "total_loss": 2 * loss, "dino_local_crops_loss": loss, "ibot_loss": 2.0}
        | {"dino_local_loss_weight": 1.0, "dino_global_crops_loss": loss, "koleo_loss": 0.1, "backbone_grad_norm": 1.0}
        for i, loss in enumerate(falls)
    ]
    file = json_lines(tmp_path / "training_metrics.json", rows)
    assert logs.read(file).form == "DINOv3"
    assert judged(file) == ("uniform", 0, 4096)


def test_a_loss_that_stays_at_its_first_value_of_ln_262144_is_uniform(tmp_path: Path) -> None:
    # facebookresearch/dinov3#199, its first post: about 12.47
    assert judged(loss_table(tmp_path, [LN[262144]] * 30))[::2] == ("uniform", 262144)


@pytest.mark.parametrize("out_dim", [None, 65536])
def test_a_loss_that_falls_from_8_to_a_twentieth_in_an_epoch_is_one_prototype(
    tmp_path: Path, out_dim: int | None
) -> None:
    # facebookresearch/dinov2#272
    epoch = 125
    losses = [8 * (0.05 / 8) ** min(1, i / epoch) for i in range(3 * epoch)]
    kind, onset, guess = judged(dinov2(tmp_path, losses), out_dim)
    scale = 8 if out_dim is None else LN[out_dim]
    first = next(i for i, loss in enumerate(losses) if loss <= 0.05 * scale)
    assert (kind, onset, guess) == ("one_prototype", 10 * first, None)


def test_a_loss_that_falls_from_10_9_to_3_over_a_hundred_epochs_is_no_collapse(tmp_path: Path) -> None:
    file = dino(tmp_path, [10.9 - 7.9 * epoch / 99 for epoch in range(100)])
    assert judged(file) == ("none", None, None)
    assert judged(file, 65536) == ("none", None, None)


def test_the_log_of_a_good_run_that_falls_rises_and_falls_is_no_collapse(tmp_path: Path) -> None:
    # facebookresearch/dino#76 to epoch 8, then on to epoch 60 of facebookresearch/dino#280
    losses = [7.698, 9.558, 8.002, 6.878, 6.253, 5.574, 5.031, 4.856, 4.643]
    losses += [4.643 + (2.759 - 4.643) * i / 52 for i in range(1, 53)]
    assert judged(dino(tmp_path, losses), 65536) == ("none", None, None)


def test_a_resnet_that_starts_at_ln_k_and_leaves_it_is_no_collapse(tmp_path: Path) -> None:
    # facebookresearch/dino#145: its first epoch is within a hundredth of ln K
    losses = [11.023, 10.481, 9.876, 9.056, 8.457, 7.883, 7.275, 6.9, 6.6, 6.4, 6.2]
    assert judged(dino(tmp_path, losses), 65536) == ("none", None, None)


def test_a_loss_that_stays_where_it_began_above_ln_k_has_not_started(tmp_path: Path) -> None:
    # facebookresearch/dinov2#479, its first 130 iterations
    file = dinov2(tmp_path, [11.2866, 11.284, 11.282, 11.28, 11.278, 11.275])
    assert judged(file, 65536) == ("not_started", 0, None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_to_the_end_is_diverged(tmp_path: Path, value: float) -> None:
    assert judged(loss_table(tmp_path, [9.0, 8.0, value, value])) == ("diverged", 2, None)


def test_a_loss_that_is_finite_again_is_not_diverged_but_told(tmp_path: Path) -> None:
    file = loss_table(tmp_path, [9.0, math.nan, 8.0, 7.0, 6.0])
    assert judged(file)[0] == "none"
    [(step, column, value)] = logs.read(file).broken
    assert (step, column) == (1, "loss")
    assert math.isnan(value)


def test_a_first_loss_that_is_not_finite_is_diverged_from_there(tmp_path: Path) -> None:
    assert judged(loss_table(tmp_path, [math.nan, math.nan])) == ("diverged", 0, None)


def test_a_total_that_is_not_finite_is_diverged_though_the_dino_loss_is(tmp_path: Path) -> None:
    # facebookresearch/dinov2#143: koleo_loss inf from the first iteration on
    rows = [json.loads(line) for line in dinov2(tmp_path, [11.81] * 6).read_text().splitlines()]
    file = json_lines(tmp_path / "log.json", [row | {"koleo_loss": math.inf, "total_loss": math.inf} for row in rows])
    assert judged(file, 65536) == ("diverged", 0, None)
    assert {column for _, column, _ in logs.read(file).broken} == {"total_loss"}


# ------------------------------------------------------------------------------------------------- rules on the loss


def test_a_collapse_that_is_left_stays_on_record(tmp_path: Path) -> None:
    log = logs.read(loss_table(tmp_path, [9.0] * 5 + [LN[4096]] * 20 + [5.0] * 75))
    verdict = logs.of_loss(log, 4096)
    assert (verdict.kind, verdict.onset_step, verdict.left) == ("none", None, (("uniform", 5, 25),))


@pytest.mark.parametrize(("records_at", "kind"), [(2, "none"), (5, "none"), (6, "uniform")])
def test_a_loss_must_stay_at_ln_k_for_a_twentieth_of_the_log(tmp_path: Path, records_at: int, kind: str) -> None:
    falls = [7.0 - i / 50 for i in range(100 - records_at)]
    assert logs.of_loss(logs.read(loss_table(tmp_path, falls + [LN[4096]] * records_at)), 4096).kind == kind


@pytest.mark.parametrize(("share", "kind"), [(0.985, "none"), (0.991, "uniform"), (1.009, "uniform"), (1.015, "none")])
def test_the_loss_of_uniform_targets_is_within_a_hundredth_of_ln_k(tmp_path: Path, share: float, kind: str) -> None:
    log = logs.read(loss_table(tmp_path, [12.0] * 10 + [share * LN[4096]] * 10))
    assert logs.of_loss(log, 4096).kind == kind


def test_two_records_are_too_few_to_say_anything(tmp_path: Path) -> None:
    assert judged(loss_table(tmp_path, [LN[4096]] * 2), 4096) == ("none", None, None)


def test_no_guess_is_near_two_numbers_of_prototypes() -> None:
    logarithms = [math.log(out_dim) for out_dim in logs.GUESSES]
    assert min(b - a for a, b in itertools.pairwise(logarithms)) > 2 * logs.GUESS_NATS
    assert {2**power for power in range(8, 19)} <= set(logs.GUESSES)


@pytest.mark.parametrize(("off", "guess"), [(0.004, 4096), (-0.004, 4096), (0.006, None), (-0.006, None)])
def test_k_is_guessed_from_the_last_tenth_and_only_within_the_stated_distance(off: float, guess: int | None) -> None:
    assert logs.guessed_out_dim([9.0] * 90 + [LN[4096] + off] * 10) == guess
    assert logs.guessed_out_dim([9.0] * 91 + [LN[4096] + off] * 9) is None


# ------------------------------------------------------------------------------------------------ what the loss is


def of_pairs(targets: torch.Tensor, log_probs: torch.Tensor, pairs: Iterable[tuple[int, int]]) -> list[float]:
    return [-float((targets[t] * log_probs[s]).sum(dim=-1).mean()) for t, s in pairs]


@pytest.fixture
def crops() -> tuple[torch.Tensor, torch.Tensor]:
    """Targets of 2 global crops, and the student's log-probabilities of these and of 6 local ones."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 3, 16, generator=generator).softmax(dim=-1)
    return targets, torch.randn(8, 3, 16, generator=generator).log_softmax(dim=-1)


@pytest.mark.parametrize("local_crops", [0, 6])
def test_the_parts_of_dinov2_make_the_mean_over_pairs(
    tmp_path: Path, crops: tuple[torch.Tensor, torch.Tensor], local_crops: int
) -> None:
    targets, log_probs = crops[0], crops[1][: 2 + local_crops]
    local = of_pairs(targets, log_probs, [(t, s) for t in (0, 1) for s in range(2, 2 + local_crops)])
    of_both = of_pairs(targets, log_probs, [(1, 0), (0, 1)])
    # ssl_meta_arch.py: the global crops are one list, whose mean is taken twice
    terms = 2 + max(2 * local_crops, 1)
    row = {"iteration": 0, "dino_global_crops_loss": 2 * sum(of_both) / 2 / terms, "total_loss": 99.0}
    row |= {"dino_local_crops_loss": sum(local) / terms} if local_crops else {}
    log = logs.read(json_lines(tmp_path / "training_metrics.json", [row]))
    assert log.form == "DINOv2"
    assert log.losses == pytest.approx([float(cross_entropy(targets, log_probs))])


def test_the_parts_of_dinov3_are_means_of_their_own(tmp_path: Path, crops: tuple[torch.Tensor, torch.Tensor]) -> None:
    local = of_pairs(*crops, [(t, s) for t in (0, 1) for s in range(2, 8)])
    of_both = of_pairs(*crops, [(1, 0), (0, 1)])
    means = sum(local) / 12, sum(of_both) / 2
    row = {"iteration": 0, "dino_local_crops_loss": means[0], "dino_global_crops_loss": means[1]}
    log = logs.read(json_lines(tmp_path / "l", [row | {"dino_local_loss_weight": 1.0}]))
    assert log.losses == pytest.approx([sum(means) / 2])
    assert any("does not tell the number of local crops" in note for note in log.notes)


def test_a_loss_is_the_sum_of_entropy_and_kl_where_it_has_no_column(tmp_path: Path) -> None:
    log = logs.read(table(tmp_path, "epoch,teacher_entropy,kl", [(0, 2.5, 1.0), (1, 2.0, 0.5)]))
    assert log.losses == [3.5, 2.5]
    assert log.records[1].values[records.TEACHER_ENTROPY] == 2.0


# ----------------------------------------------------------------------------------------------------- how it is read


def test_official_logs_are_told_apart_and_what_is_not_used_is_told(tmp_path: Path) -> None:
    log = logs.read(dino(tmp_path, [9.0, 8.0]))
    assert (log.form, log.unit, log.unused) == ("DINO", "epoch", ("train_wd",))
    assert log.read_as == {"train_loss": records.LOSS, "train_lr": records.LR, "epoch": "epoch"}
    log = logs.read(dinov2(tmp_path, [9.0, 8.0]))
    assert (log.form, log.unit) == ("DINOv2", "iteration")
    assert log.unused == ("iter_time", "data_time", "wd", "mom", "current_batch_size", "koleo_loss", "ibot_loss")


def test_columns_are_read_by_either_name_in_any_case_and_empty_cells_are_missing(tmp_path: Path) -> None:
    header = "Step,epoch,train/loss,teacher_entropy,targets/mutual_information,OUT_DIM,accuracy"
    log = logs.read(table(tmp_path, header, [(10, 0.5, 5.0, 4.0, 0.25, 256, "good"), (20, 1, 4.5, "", "", 256, "")]))
    first, second = log.records
    assert (first.step, first.epoch, log.unit, log.unused) == (10, 0.5, "step", ("accuracy",))
    assert first.values == {
        records.LOSS: 5.0,
        records.TEACHER_ENTROPY: 4.0,
        records.MUTUAL_INFORMATION: 0.25,
        records.PROTOTYPES_NUMBER: 256.0,
    }
    assert second.values == {records.LOSS: 4.5, records.PROTOTYPES_NUMBER: 256.0}


def test_lines_without_a_loss_are_left_out_and_counted(tmp_path: Path) -> None:
    log = logs.read(table(tmp_path, "step,loss,val", [(1, 5.0, ""), (1, "", 0.5), (2, 4.0, "")]))
    assert [record.step for record in log.records] == [1, 2]
    assert "1 lines without a loss are left out" in log.notes


def test_a_run_that_was_taken_up_again_has_each_step_once_as_it_was_last(tmp_path: Path) -> None:
    rows = [(0, 9.0), (1, 8.0), (2, math.nan), (3, math.nan), (2, 7.0), (3, 6.0)]
    log = logs.read(table(tmp_path, "epoch,loss", rows))
    assert [(record.step, loss) for record, loss in zip(log.records, log.losses, strict=True)] == [
        (0, 9.0),
        (1, 8.0),
        (2, 7.0),
        (3, 6.0),
    ]
    assert log.broken == ()
    assert any(note.startswith("2 records are left out") for note in log.notes)


def test_a_last_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    file = dino(tmp_path, [9.0, 8.0, 7.0])
    file.write_text(file.read_text()[:-9])
    assert logs.read(file).losses == [9.0, 8.0]
    file = table(tmp_path, "step,loss,lr", [(0, 9.0, 0.1), (1, 8.0, 0.1)])
    file.write_text(file.read_text()[:-5])
    assert logs.read(file).losses == [9.0]


GOOD = '{"train_loss": 9.0, "epoch": 0}\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "log: is empty"),
        ("\n\n", "log: is empty"),
        ("step,loss\n", "no line below them"),
        ("I20250119 10:05:11 Training [40/50] total_loss: 15.6\n", "log, line 1: neither a JSON object nor the names"),
        ("0,9.5\n1,9.4\n", "log, line 1: neither a JSON object nor the names"),
        (GOOD + "{oops}\n" + GOOD, "log, line 2: is not JSON"),
        (GOOD + "[1, 2]\n", "log, line 2: must be a JSON object"),
        ("step,loss\n0,9.5\n1,9.4,7\n", "log, line 3: has 3 cells, and 2 columns have a name"),
        ("step,loss\n0,9.5\n\n1,high\n", "log, line 4: loss = 'high' must be a number"),
        ('{"epoch": 0, "train_loss": true}\n', "log, line 1: train_loss = True must be a number"),
        ("epoch,loss\n0.5,9.5\n", "log, line 2: epoch = 0.5 must be a whole number"),
        ("epoch,accuracy\n0,9.5\n", "needed is a column train/loss or loss or train_loss or dino_loss or"),
        ("epoch,kl\n0,9.5\n", "its columns are epoch, kl"),
        ("time,loss\n0,9.5\n", "needed is a column step or global_step or iteration or iter or epoch"),
        ("epoch,loss\n0,\n", "no line has both a loss and its epoch"),
    ],
)
def test_what_cannot_be_read_says_where_and_what_is_allowed(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(ValueError, match="log") as error:
        logs.read(tmp_path / "log")
    assert told in str(error.value)


def test_what_is_no_text_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth").write_bytes(b"PK\x03\x04\xff\xfe\x80")
    for path, told in [
        (tmp_path / "nowhere", "there is no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "checkpoint.pth", "is not text"),
    ]:
        with pytest.raises(ValueError, match=told):
            logs.read(path)


def test_what_is_read_of_named_columns_is_logged_here_or_tells_when(tmp_path: Path) -> None:
    names = set(logs.COLUMNS) - {"step", "iteration", "epoch"}
    assert names <= set(records.METRICS)
    assert all(name in logs.COLUMNS[name] for name in names)
    aliases = [alias for names in logs.COLUMNS.values() for alias in names]
    assert len(set(aliases)) == len(aliases)
