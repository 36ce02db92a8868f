"""Training of one trial: what it yields and keeps, and that nothing but the trial decides it."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_lab.core import records
from dino_lab.core.data.batches import Batches, Wholes
from dino_lab.core.evals.attention import whole_masks
from dino_lab.core.evals.retrieval import mean_average_precision
from dino_lab.core.evaluation import PICTURES
from dino_lab.core.networks.weights import read_network
from dino_lab.core.records import Record
from dino_lab.core.schedules import Now
from dino_lab.core.trainer import CHECKPOINT, DATA, Diverged, train
from dino_lab.core.trial import EvalName, Trial

SHORT = {
    "epochs": 2,
    "data.train_images": 24,  # three steps an epoch
    "data.test_images": 8,
    "backbone.drop_path_rate": 0.3,
    "method.loss.teacher_temp": 0.07,
    "method.loss.warmup_teacher_temp_epochs": 2,
    "optimizer.warmup_epochs": 0.5,
    "method.head.freeze_last_layer_epochs": 1.0,
    # Every record looks like a collapse, so that a resume has a verdict to carry on with.
    "collapse.uniform_entropy": 1.0,
    "collapse.one_prototype_entropy": 0.99,
    "collapse.low_kl": 1e6,
    "collapse.certain_steps": 2,
    "runtime.log_period_steps": 1,
    "runtime.checkpoint_period_steps": 1,
}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def short(smoke: Trial, data_dir: Path) -> Trial:
    """Six steps over two epochs, with everything that a resume could get wrong."""
    return smoke.but(SHORT | {"runtime.data_dir": str(data_dir)})


def shown(made: list[Record]) -> list[tuple[Any, ...]]:
    """Records without what differs from run to run."""
    return [
        (
            r.step,
            r.epoch,
            {k: v for k, v in r.values.items() if k not in records.TIMINGS},
            r.verdict,
            r.onset_step,
            r.left,
        )
        for r in made
    ]


def run(trial: Trial, workdir: Path, **resume: Path) -> list[Record]:
    workdir.mkdir(exist_ok=True)
    return list(train(trial, workdir=workdir, **resume))


def kept(workdir: Path) -> dict[str, Any]:
    """The checkpoint, without what differs from run to run."""
    state: dict[str, Any] = torch.load(workdir / CHECKPOINT, weights_only=True)
    del state["seconds"]
    return state


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """The same structure, and the same bits in every tensor."""
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}.{i}")
    else:
        assert ours == theirs, where


# --------------------------------------------------------------------------------------------------- sameness


def test_the_same_trial_gives_the_same_records_and_checkpoint(short: Trial, tmp_path: Path) -> None:
    first, second = run(short, tmp_path / "a"), run(short, tmp_path / "b")
    assert shown(first) == shown(second)
    assert_same(kept(tmp_path / "a"), kept(tmp_path / "b"))


def test_another_seed_gives_other_records(short: Trial, tmp_path: Path) -> None:
    assert shown(run(short, tmp_path)) != shown(run(short.but({"seed": 1}), tmp_path))


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_six_steps_equal_some_plus_a_resume_plus_the_rest(short: Trial, precision: str, tmp_path: Path) -> None:
    short = short.but({"precision": precision})
    whole, workdir = [], tmp_path / "whole"
    workdir.mkdir()
    for record in train(short, workdir=workdir):
        whole.append(record)
        # The checkpoint of a step is written once its record has been taken.
        if record.step > 1:
            shutil.copy(workdir / CHECKPOINT, tmp_path / f"after-{record.step - 1}.pt")
    assert [record.step for record in whole] == [0, 1, 2, 3, 4, 5, 6]
    assert [record.onset_step for record in whole] == [None, None, None, 1, 1, 1, 1]

    for step in range(1, 6):
        resumed = tmp_path / f"resumed-{step}"
        rest = run(short, resumed, resume_from=tmp_path / f"after-{step}.pt")
        assert shown(rest) == shown(whole[step + 1 :])
        assert_same(kept(resumed), kept(workdir))


def test_resuming_in_the_same_folder_goes_on_from_its_checkpoint(short: Trial, tmp_path: Path) -> None:
    whole = run(short, tmp_path / "whole")
    workdir = tmp_path / "stopped"
    workdir.mkdir()
    first = list(itertools.islice(train(short, workdir=workdir), 5))
    assert kept(workdir)["step"] == 3  # the record of step 4 was taken, its checkpoint not yet written
    rest = run(short, workdir, resume_from=workdir / CHECKPOINT)
    assert shown(first[:4] + rest) == shown(whole)
    assert_same(kept(workdir), kept(tmp_path / "whole"))


def test_a_finished_trial_resumes_to_nothing(short: Trial, tmp_path: Path) -> None:
    run(short, tmp_path)
    assert run(short, tmp_path, resume_from=tmp_path / CHECKPOINT) == []


@pytest.mark.parametrize("loader_workers", [1, 2])
def test_loader_workers_change_no_record(short: Trial, loader_workers: int, tmp_path: Path) -> None:
    here = run(short, tmp_path / "here")
    ahead = run(short.but({"runtime.loader_workers": loader_workers}), tmp_path / "ahead")
    assert shown(here) == shown(ahead)
    assert_same(kept(tmp_path / "here"), kept(tmp_path / "ahead"))


def test_measuring_and_checkpointing_less_often_change_no_weight(short: Trial, tmp_path: Path) -> None:
    often = run(short, tmp_path / "often")
    seldom = {"runtime.log_period_steps": 4, "runtime.checkpoint_period_steps": 100}
    rare = run(short.but(seldom), tmp_path / "rare")
    assert_same(kept(tmp_path / "often")["method"], kept(tmp_path / "rare")["method"])
    # All but the verdict's onset, which can be dated to a record only.
    assert shown(rare)[-1][:3] == shown(often)[-1][:3]


def test_the_callers_random_state_is_untouched_and_unread(short: Trial, tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = run(short, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before
    torch.manual_seed(2)
    assert shown(run(short, tmp_path)) == shown(first)


def test_arms_with_the_same_seed_see_the_same_crops(
    short: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Batches.__getitem__
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(self: Batches, step: int) -> tuple[Tensor, Tensor]:
        seen.append(fetch(self, step))
        return seen[-1]

    monkeypatch.setattr(Batches, "__getitem__", watched)
    for arm in (
        {},
        {"method.operation.kind": "none", "method.head.out_dim": 16, "backbone.depth": 1, "optimizer.lr": 0.1},
    ):
        run(short.but(arm), tmp_path)
    one, other = seen[:6], seen[6:]
    assert_same([list(crops) for crops in one], [list(crops) for crops in other])
    assert not torch.equal(one[0][0], one[3][0])
    run(short.but({"seed": 1}), tmp_path)
    assert not torch.equal(seen[12][0], one[0][0])


# ---------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("period", "every_epochs", "steps", "evaluated"),
    [
        (1, 1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], {0, 3, 6, 9}),
        (2, 1, [0, 2, 3, 4, 6, 8, 9], {0, 3, 6, 9}),
        (4, 2, [0, 4, 6, 8, 9], {0, 6, 9}),
        (100, 100, [0, 9], {0, 9}),
    ],
)
def test_records_come_at_the_start_each_period_each_evaluation_and_the_end(
    short: Trial, period: int, every_epochs: int, steps: list[int], evaluated: set[int], tmp_path: Path
) -> None:
    trial = short.but({"epochs": 3, "runtime.log_period_steps": period, "evals.every_epochs": every_epochs})
    made = run(trial, tmp_path)
    assert [record.step for record in made] == steps
    assert {record.step for record in made if records.KNN in record.values} == evaluated
    assert [record.epoch for record in made] == [step / 3 for step in steps]
    assert all(records.LOSS in record.values for record in made[1:])


def test_the_first_record_is_the_untrained_network_beside_raw_pixels(short: Trial, tmp_path: Path) -> None:
    first, *_ = train(short, workdir=tmp_path)
    factors = ["shape", "color", "texture", "background", "position"]
    of_network = {records.KNN, records.EVALUATED_RANK, *(f"{records.KNN_OF}{number}" for number in (10, 100, 200))}
    of_student = {name.replace("eval/", records.STUDENT) for name in of_network}
    of_factors = {prefix + factor for prefix in (records.FACTOR_KNN, records.FACTOR_PIXELS_KNN) for factor in factors}
    assert set(first.values) == of_network | of_student | of_factors | {records.PIXELS_KNN}
    assert first.values[records.KNN] == first.values[records.STUDENT_KNN]
    assert first.verdict == "none"


def test_every_name_in_a_record_has_a_meaning(short: Trial, tmp_path: Path) -> None:
    everything = {"evals.at_end": list(get_args(EvalName))}
    made = run(short.but(everything), tmp_path) + run(short.but({"method.loss.kind": "mse"}), tmp_path)
    assert {records.metric(name).name for record in made for name in record.values} >= set(records.METRICS)


def test_loss_is_teacher_entropy_plus_kl_at_every_record(short: Trial, tmp_path: Path) -> None:
    for precision in ("f32", "bf16"):
        for record in run(short.but({"precision": precision}), tmp_path)[1:]:
            parts = record.values[records.TEACHER_ENTROPY] + record.values[records.KL]
            assert record.values[records.LOSS] == pytest.approx(parts, abs=1e-5)


def test_scheduled_values_are_logged_beside_what_they_cause(short: Trial, tmp_path: Path) -> None:
    made = run(short, tmp_path)[1:]
    optimizer = short.optimizer
    for step, record in enumerate(made):
        values = record.values
        now = Now(step, steps=6, steps_per_epoch=3, measured=True)
        assert values[records.LR] == pytest.approx(optimizer.lr_at(now, batch_size=8))
        assert values[records.WEIGHT_DECAY] == pytest.approx(optimizer.weight_decay_at(now))
        assert values[records.MOMENTUM_TEACHER] == pytest.approx(short.method.teacher.momentum_at(now))
        assert values[records.TEACHER_TEMP] == pytest.approx((0.04, 0.07)[step // 3])


def test_the_last_layer_is_held_for_its_epochs(short: Trial, tmp_path: Path) -> None:
    name = "student.head.last_layer.weight_v"
    # While the record of a step is being taken, the checkpoint is that of the step before.
    later = itertools.islice(train(short, workdir=tmp_path), 2, None)
    one, two, three, four, *_ = [kept(tmp_path)["method"][name] for _ in later]  # an epoch has three steps
    assert torch.equal(one, two)
    assert torch.equal(two, three)
    assert not torch.equal(three, four)


def test_bf16_runs_and_keeps_its_weights_in_f32(short: Trial, tmp_path: Path) -> None:
    f32 = run(short, tmp_path)
    bf16 = run(short.but({"precision": "bf16"}), tmp_path)
    assert {value.dtype for value in kept(tmp_path)["method"].values()} == {torch.float32}
    assert f32[1].values[records.LOSS] != bf16[1].values[records.LOSS]
    assert bf16[1].values[records.LOSS] == pytest.approx(f32[1].values[records.LOSS], rel=0.2)


def test_what_was_trained_on_and_judged_is_told_beside_the_checkpoint(short: Trial, tmp_path: Path) -> None:
    run(short.but({"evals.data.kind": "digits"}), tmp_path)
    data = json.loads((tmp_path / DATA).read_text())
    told = {role: (facts["name"], facts["split"], facts["images"]) for role, facts in data.items()}
    assert told == {
        "training": ("shapes", "train", 24),
        "neighbours": ("digits", "bank", 1437),
        "evaluation": ("digits", "test", 360),
    }
    assert len({facts["digest"] for facts in data.values()}) == 3


def test_judged_by_another_data_set_a_trial_trains_the_same_and_tells_that_sets_factors(
    short: Trial, tmp_path: Path
) -> None:
    own = run(short, tmp_path / "own")
    digits = run(short.but({"evals.data.kind": "digits"}), tmp_path / "digits")
    assert_same(kept(tmp_path / "own")["method"], kept(tmp_path / "digits")["method"])
    assert {name for name in digits[-1].values if name.startswith(records.FACTOR_KNN)} == {f"{records.FACTOR_KNN}digit"}
    for a, b in zip(own, digits, strict=True):
        assert a.values.get(records.LOSS) == b.values.get(records.LOSS)


def test_images_that_nobody_labelled_are_trained_on_and_not_judged(short: Trial, tmp_path: Path) -> None:
    (tmp_path / "photographs" / "train").mkdir(parents=True)
    for i in range(16):
        Image.new("RGB", (20 + i, 30), (16 * i, 0, 255 - 16 * i)).save(tmp_path / "photographs" / "train" / f"{i}.png")
    trial = short.but({"data.kind": "imagefolder", "data.root": str(tmp_path / "photographs"), "data.image_size": None})
    made = run(trial, tmp_path / "work")
    assert [record.step for record in made] == [0, 1, 2, 3, 4]
    assert made[0].values == {}
    assert all(np.isfinite(record.values[records.LOSS]) for record in made[1:])
    assert not any("knn" in name for record in made for name in record.values)
    with pytest.raises(ValueError, match=r"method\.kind = 'supervised': needs images with classes"):
        run(trial.but({"method.kind": "supervised"}), tmp_path / "supervised")


def test_time_is_counted_over_all_attempts(short: Trial, tmp_path: Path) -> None:
    first = list(itertools.islice(train(short, workdir=tmp_path), 4))
    rest = run(short, tmp_path, resume_from=tmp_path / CHECKPOINT)
    minutes = [record.values[records.TRAIN_MINUTES] for record in [*first[1:3], *rest]]
    assert all(a < b for a, b in itertools.pairwise(minutes))
    assert minutes[0] > 0
    assert all(record.values[records.PEAK_MEMORY] > 100 for record in rest)


# ------------------------------------------------------------------------------------------------ evaluations


def test_what_is_asked_for_at_the_end_is_evaluated_at_the_start_too_and_what_during_in_between(
    short: Trial, tmp_path: Path
) -> None:
    made = run(short.but({"evals.during": ["retrieval"], "evals.at_end": ["low_shot"]}), tmp_path)
    found = {record.step: {name for name in record.values if name.startswith("eval/")} for record in made}
    low_shot = {name for number in (1, 10) for name in both(f"{records.LOW_SHOT}{number}")}
    assert {step: names for step, names in found.items() if names} == {
        0: low_shot,
        3: both(records.RETRIEVAL),
        6: low_shot,
    }


def both(name: str) -> set[str]:
    return {name, name.replace("eval/", records.STUDENT)}


def test_teacher_minus_student_is_their_difference(short: Trial, tmp_path: Path) -> None:
    for record in run(short, tmp_path)[1:]:
        if records.KNN in record.values:
            difference = record.values[records.KNN] - record.values[records.STUDENT_KNN]
            assert record.values[records.TEACHER_MINUS_STUDENT] == difference


def test_evaluations_are_those_of_their_functions_on_the_networks_features(short: Trial, tmp_path: Path) -> None:
    """Of the network at the start, whose weights the seed alone makes."""
    trial = short.but({"evals.at_end": ["linear", "retrieval", "attention"], "evals.linear.blocks_number": 2})
    first, *_ = train(trial, workdir=tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        backbone = trial.backbone.build(trial.crops.global_crops_size).eval()
    sets = trial.data.build_all(Path(str(trial.runtime.data_dir)))
    size = trial.crops.global_crops_size
    with torch.no_grad():
        bank, test = (
            backbone.look(torch.cat(list(Wholes(sets[split], size).load(loader_workers=0))), blocks_number=2)
            for split in ("bank", "test")
        )
    labels, truth = (sets[split].labels["class"] for split in ("bank", "test"))
    linear = trial.evals.linear.top1(
        torch.cat(list(bank.blocks), dim=-1), labels, torch.cat(list(test.blocks), dim=-1), truth, seed=trial.seed
    )
    assert (first.values[records.LINEAR], first.values[records.LINEAR_RATE]) == linear
    expected = mean_average_precision(test.blocks[-1], truth, bank.blocks[-1], labels)
    assert first.values[records.RETRIEVAL] == pytest.approx(expected, rel=1e-6)
    masks = whole_masks(sets["test"].masks, size)
    for mass, percent in trial.evals.attention.jaccard(test.attention, masks).items():
        assert first.values[f"{records.JACCARD}{100 * mass:g}"] == pytest.approx(percent, rel=1e-6)


def test_attention_is_drawn_at_each_evaluation_that_asks_for_it(short: Trial, tmp_path: Path) -> None:
    run(short.but({"evals.during": ["pictures"], "evals.at_end": ["knn", "pictures"]}), tmp_path)
    drawn = sorted((tmp_path / PICTURES).iterdir())
    assert [path.name for path in drawn] == [f"attention-{step}.png" for step in (0, 3, 6)]
    with Image.open(drawn[0]) as picture:
        # Eight images below one another; beside each its three heads.
        assert picture.size == (4 * 96 + 3 * 4, 8 * 96 + 7 * 4)


# --------------------------------------------------------------------------------------------------- collapse

AT_ONCE = {
    "collapse.uniform_entropy": 1.0,
    "collapse.one_prototype_entropy": 0.999,
    "collapse.low_kl": 1e6,
    "collapse.unmoved": 1e-6,
    "collapse.certain_steps": 0,
    "collapse.certain_fraction": 0.0,
}
"""Whatever moves is called one prototype: of the second step on, since the first is where it began."""


def test_a_collapse_is_recorded_and_changes_nothing_else(short: Trial, tmp_path: Path) -> None:
    plain, called = run(short, tmp_path), run(short.but(AT_ONCE), tmp_path)
    assert [record.verdict for record in called] == ["none", "not_started"] + ["one_prototype"] * 5
    assert [each[:3] for each in shown(called)] == [each[:3] for each in shown(plain)]


def test_a_collapse_ends_the_trial_if_asked_with_an_evaluation_and_for_good(short: Trial, tmp_path: Path) -> None:
    trial = short.but(AT_ONCE | {"collapse.policy": "stop", "collapse.after_steps": 3})
    made = run(trial, tmp_path)
    assert [record.step for record in made] == [0, 1, 2, 3, 4]
    assert [record.verdict for record in made][-2:] == ["one_prototype"] * 2
    assert records.KNN in made[-1].values
    assert kept(tmp_path)["finished"] is False
    assert run(trial, tmp_path, resume_from=tmp_path / CHECKPOINT) == []


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("changed", "role"), [("train", "training"), ("val", "evaluation")])
def test_a_checkpoint_of_other_images_is_refused(short: Trial, changed: str, role: str, tmp_path: Path) -> None:
    root = tmp_path / "photographs"
    for split, name, color in itertools.product(("train", "val"), "ab", range(8)):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * color, 0, 0)).save(root / split / name / f"{color}.png")
    trial = short.but({"data.kind": "imagefolder", "data.root": str(root), "data.image_size": 16})
    run(trial, tmp_path / "work")
    told = (tmp_path / "work" / DATA).read_text()
    Image.new("RGB", (20, 20), "white").save(root / changed / "a" / "0.png")
    with pytest.raises(ValueError, match=f"is of other images for {role} than are in {root / changed}"):
        run(trial, tmp_path / "work", resume_from=tmp_path / "work" / CHECKPOINT)
    assert (tmp_path / "work" / DATA).read_text() == told


def test_a_loss_that_is_not_finite_ends_the_trial_as_diverged(short: Trial, tmp_path: Path) -> None:
    trial = short.but({"optimizer.lr": 1e30, "optimizer.clip_grad": 0.0, "runtime.checkpoint_period_steps": 100})
    made: list[Record] = []
    with pytest.raises(Diverged) as raised:
        made.extend(train(trial, workdir=tmp_path))
    last = made.pop()
    assert (last.step, last.verdict, last.onset_step) == (raised.value.step, "diverged", raised.value.step)
    assert last.values == {}
    assert made[-1].step == raised.value.step - 1
    assert all(np.isfinite(list(record.values.values())).all() for record in made)
    assert isinstance(raised.value, RuntimeError)
    assert str(raised.value.step) in str(raised.value)


def test_a_checkpoint_of_another_trial_is_refused(short: Trial, tmp_path: Path) -> None:
    run(short, tmp_path)
    with pytest.raises(ValueError, match=f"{short.identity}, not of"):
        run(short.but({"optimizer.lr": 0.1}), tmp_path, resume_from=tmp_path / CHECKPOINT)


def test_a_checkpoint_may_be_resumed_under_another_runtime(short: Trial, tmp_path: Path) -> None:
    run(short, tmp_path)
    assert run(short.but({"runtime.loader_workers": 1}), tmp_path, resume_from=tmp_path / CHECKPOINT) == []


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_a_runtime_error(short: Trial, part: float, tmp_path: Path) -> None:
    run(short, tmp_path)
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(part * len(content))])
    with pytest.raises(RuntimeError, match=r"cut\.pt cannot be read"):
        run(short, tmp_path, resume_from=tmp_path / "cut.pt")


# -------------------------------------------------------------------------------------------- a trial's checkpoint


def test_a_teacher_is_taken_from_a_finished_trial_alone(short: Trial, tmp_path: Path) -> None:
    teacher = short.but({"seed": 3})
    (tmp_path / teacher.identity).mkdir()
    records_of_teacher = train(teacher, workdir=tmp_path / teacher.identity)
    list(itertools.islice(records_of_teacher, 4))
    student = short.but({"method.teacher.kind": "frozen", "method.teacher.checkpoint": teacher.identity})
    with pytest.raises(ValueError, match="its trial has not finished, at step 2"):
        run(student, tmp_path / student.identity)
    list(records_of_teacher)
    made = run(student, tmp_path / student.identity)
    # A teacher that does not move is not judged: the student is, in both places.
    assert made[-1].values[records.KNN] == made[-1].values[records.STUDENT_KNN]
    assert kept(tmp_path / student.identity)["judged"] == "student"
    own = read_network(student.identity, tmp_path)["backbone.vit.cls_token"]
    assert torch.equal(own, kept(tmp_path / student.identity)["method"]["student.backbone.vit.cls_token"])
    frozen = kept(tmp_path / student.identity)["method"]
    trained = kept(tmp_path / teacher.identity)["method"]
    for name in trained:
        if name.startswith("teacher.network"):
            assert torch.equal(frozen[name], trained[name])


# -------------------------------------------------------------------------------------------------------- on a GPU

ON_GPU = {
    "runtime.device": "cuda",
    "runtime.gpus": 1.0,
    "runtime.log_period_steps": 1,
    "runtime.checkpoint_period_steps": 1,
    "evals.at_end": ["knn", "factors", "linear", "low_shot", "retrieval", "attention", "pictures"],
}


@pytest.mark.gpu
def test_a_trial_begins_on_a_gpu_as_on_the_processor(smoke: Trial, tmp_path: Path) -> None:
    on_gpu = smoke.but(ON_GPU | {"epochs": 1, "crops.backend": "batched"})
    there = run(on_gpu, tmp_path / "there")
    here = run(on_gpu.but({"runtime.device": "cpu", "runtime.gpus": 0.0}), tmp_path / "here")
    assert [(each.step, each.values.keys()) for each in there] == [(each.step, each.values.keys()) for each in here]
    for name in (records.LOSS, records.TEACHER_ENTROPY, records.KL, records.GRADIENT_NORM, records.EMBEDDING_RANK):
        assert there[1].values[name] == pytest.approx(here[1].values[name], rel=2e-2), name
    assert there[0].values[records.LINEAR] == pytest.approx(here[0].values[records.LINEAR], abs=10)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_killed_trial_ends_on_a_gpu_with_the_same_bits(precision: str, smoke: Trial, tmp_path: Path) -> None:
    trial = smoke.but(ON_GPU | {"precision": precision, "backbone.drop_path_rate": 0.3})
    whole = run(trial, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    begun = train(trial, workdir=tmp_path / "killed")
    first = [next(begun) for _ in range(6)]  # the record is made before its checkpoint: of step 5 there is none yet
    begun.close()
    rest = run(trial, tmp_path / "killed", resume_from=tmp_path / "killed" / CHECKPOINT)
    assert shown(first[:5] + rest) == shown(whole)
    assert_same(kept(tmp_path / "whole"), kept(tmp_path / "killed"))
