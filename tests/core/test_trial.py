"""Trial: rules across sections, and that every knob is read."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dino_lab.core.checkpoint import CHECKPOINT
from dino_lab.core.methods.dino import DINO
from dino_lab.core.methods.losses import CrossEntropy
from dino_lab.core.settings import KnobError, Settings
from dino_lab.core.trainer import train
from dino_lab.core.trial import Trial

READ_BY_THE_RUNNER = {f"runtime.{knob}" for knob in ("workers", "cpus", "gpus", "memory_gib", "max_minutes")}
READ_IN_A_COLLAPSE = {"collapse.after_steps"}
NOT_READ = READ_BY_THE_RUNNER | READ_IN_A_COLLAPSE

# Every branch on: the operations of crops, the bounds of a collapse, a warm-up of the teacher's temperature.
ALL_IN_USE = {
    **{
        f"crops.{view}.{operation}_probability": 0.5
        for view in ("global_1", "global_2", "local")
        for operation in ("blur", "solarize", "grayscale", "rotation", "noise", "erasing")
    },
    "collapse.uniform_entropy": 1.0,
    "collapse.one_prototype_entropy": 0.0,
    "collapse.low_kl": 1e6,
    "collapse.few_prototypes": 1.0,
    "collapse.few_dimensions": 1.0,
    "collapse.unmoved": 1e-6,
    "collapse.certain_steps": 0,
    "collapse.policy": "stop",
    "collapse.same_targets": 0.0,
    "method.loss.warmup_teacher_temp_epochs": 1,
    "runtime.log_period_steps": 1,
    "evals.bank_images": 48,
    "evals.at_end": ["knn", "factors", "linear", "low_shot", "retrieval", "attention", "pictures"],
    "evals.every_epochs": 1,
    "evals.linear.epochs": 2,
}


# Whatever `smoke` becomes.
SIZE = {"epochs": 2, "data.train_images": 48}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 49}, r"batch_size = 49: exceeds the 48 images of data"),
        ({"optimizer.warmup_epochs": 2.5}, r"optimizer\.warmup_epochs = 2\.5: exceeds epochs = 2"),
        (
            {"method.loss.warmup_teacher_temp_epochs": 3},
            r"method\.loss\.warmup_teacher_temp_epochs = 3: exceeds epochs = 2",
        ),
        ({"crops.global_crops_size": 20}, r"crops\.global_crops_size = 20: must be a multiple of .* 8"),
        ({"crops.local_crops_size": 12}, r"crops\.local_crops_size = 12: must be a multiple of .* 8"),
        ({"runtime.gpus": 0.5}, r"runtime\.gpus = 0\.5: runtime\.device is 'cpu'"),
        ({"precision": "f16"}, r"precision = 'f16': .*'f32' or 'bf16'"),
        ({"data.kind": "cifra10"}, r"data\.kind = 'cifra10': allowed are 'shapes', 'digits'"),
        ({"data.kind": "imagefolder"}, r"data\.root: has no default; must be set"),
        ({"crops.local.scale": [0.5, 0.2]}, r"crops\.local\.scale = \[0\.5, 0\.2\]: allowed is 0 < min <= max <= 1"),
        (
            {"data.kind": "imagefolder", "data.root": "x", "data.image_size": None, "crops.backend": "batched"},
            r"crops\.backend = 'batched': needs images that are kept at one size, by data\.image_size",
        ),
        (
            {"data.kind": "digits", "evals.data.kind": "digits", "evals.data.evaluation_split": "held_out"},
            r"evals\.data\.evaluation_split = 'held_out': .* of which data\.evaluation_split = 'test' trains on all",
        ),
        (
            {"data.kind": "digits", "evals.at_end": ["attention"]},
            r"evals\.at_end has 'attention': no objects are marked in images of kind 'digits'",
        ),
        (
            {"backbone.name": "resnet18", "evals.during": ["pictures"]},
            r"evals\.during has 'pictures': needs a CLS token, which backbone\.name = 'resnet18'",
        ),
        ({"method.kind": "mae", "evals.at_end": ["attention"]}, r"method\.kind = 'mae' do not judge by"),
        ({"evals.at_end": ["knnn"]}, r"evals\.at_end.* = 'knnn': .*'knn'"),
        ({"crops.hue": 0.1}, r"unknown knob 'crops\.hue'; did you mean 'crops\.global_1\.hue'"),
        ({"method.teacher_tmp": 0.1}, r"unknown knob 'method\.teacher_tmp'; did you mean 'method\.loss\.teacher_temp'"),
        ({"teacher_temp": 0.1}, r"unknown knob 'teacher_temp'; did you mean 'method\.loss\.teacher_temp'"),
        ({"method.kind": "mae", "backbone.name": "resnet18"}, r"backbone\.name = 'resnet18': .* method\.kind = 'mae'"),
        ({"accumulation_steps": 3}, r"accumulation_steps = 3: must divide batch_size = 8"),
        (
            {"accumulation_steps": 2, "runtime.workers": 3},
            r"runtime\.workers = 3: times accumulation_steps = 2 must divide batch_size = 8",
        ),
        (
            {"runtime.device": "cuda", "runtime.workers": 2, "runtime.gpus": 0.5},
            r"runtime\.gpus = 0\.5: .* runtime\.workers = 2",
        ),
        (
            {"method.kind": "swav", "method.queue_size": 8, "method.queue_start_epochs": 2.0},
            r"method\.queue_start_epochs = 2\.0: is not before the end, epochs = 2, so that method\.queue_size = 8",
        ),
    ],
)
def test_a_trial_that_cannot_be_run_is_refused(smoke: Trial, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KnobError, match=message):
        smoke.but(SIZE).but(changes)


def test_images_may_be_held_out_of_a_data_set_that_is_not_trained_on_or_holds_them_out_too(smoke: Trial) -> None:
    held_out = {"evals.data.kind": "digits", "evals.data.evaluation_split": "held_out"}
    smoke.but(held_out)
    smoke.but({"data.kind": "digits", "data.evaluation_split": "held_out", **held_out})


def test_all_that_is_wrong_is_said_at_once(smoke: Trial) -> None:
    with pytest.raises(KnobError) as raised:
        smoke.but({**SIZE, "batch_size": 49, "runtime.gpus": 1.0, "crops.local_crops_size": 12})
    assert len(str(raised.value).splitlines()) == 3


def test_the_patch_size_of_the_name_counts_where_none_is_set(smoke: Trial) -> None:
    with pytest.raises(KnobError, match="patch size, 16"):
        smoke.but({"backbone.patch_size": None})


def test_a_trial_survives_json(smoke: Trial) -> None:
    for trial in (smoke, smoke.but({"data.kind": "digits"}), Trial()):
        again = Trial.of(json.loads(json.dumps(trial.model_dump(mode="json"))))
        assert again == trial
        assert again.identity == trial.identity


def test_runtime_is_no_part_of_the_identity_and_all_else_is(smoke: Trial) -> None:
    assert smoke.but({"runtime.workers": 2, "runtime.cpus": 4, "runtime.loader_workers": 2}).identity == smoke.identity
    others = {
        "seed": 1,
        "precision": "bf16",
        "method.operation.kind": "none",
        "evals.every_epochs": 7,
        "data.image_size": 40,
    }
    assert len({smoke.but({knob: value}).identity for knob, value in others.items()} | {smoke.identity}) == 6


# -------------------------------------------------------------------------------------------------- dead knobs


def knobs(settings: Settings, prefix: str = "") -> Iterator[tuple[str, type[Settings], str]]:
    """Path, class and field of every knob."""
    for name, value in settings:
        if isinstance(value, Settings):
            yield from knobs(value, f"{prefix}{name}.")
        elif name != "kind":  # read by the union that chose the class
            yield f"{prefix}{name}", type(settings), name


def unread(trial: Trial, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The knobs that an epoch of this trial, and a step, never look at."""
    read: set[tuple[type[Settings], str]] = set()
    every = list(knobs(trial))
    plain = Settings.__getattribute__

    def watched(self: Settings, name: str) -> Any:
        read.add((type(self), name))
        return plain(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Settings, "__getattribute__", watched)
        list(itertools.islice(train(trial, workdir=workdir), 6))
    return {path for path, owner, name in every if (owner, name) not in read}


OF_TOKENS = {"evals.attention.mass", "evals.linear.blocks_number", "evals.linear.patch_mean"}
"""What is evaluated of tokens, where a network is judged by its patches' mean."""

SWITCHES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "digits": ({"data.kind": "digits", "batch_size": 512}, {"evals.attention.mass"}),
    "sgd": ({"optimizer.kind": "sgd", "optimizer.warmup_epochs": 1.0}, set()),
    "lars": ({"optimizer.kind": "lars", "optimizer.warmup_epochs": 1.0}, set()),
    "clip all": ({"optimizer.clip_over": "all"}, set()),
    "accumulation": ({"accumulation_steps": 2}, set()),
    "mlp head": ({"method.head.kind": "mlp"}, set()),
    "predictor": ({"method.predictor.kind": "mlp"}, set()),
    "student_copy": ({"method.teacher.kind": "student_copy"}, set()),
    "previous_iteration": ({"method.teacher.kind": "previous_iteration"}, set()),
    "previous_epoch": ({"method.teacher.kind": "previous_epoch"}, set()),
    "softmax_batch": ({"method.operation.kind": "softmax_batch"}, set()),
    "sinkhorn": ({"method.operation.kind": "sinkhorn"}, set()),
    "no operation": ({"method.operation.kind": "none"}, set()),
    "no sharpening": (
        {"method.loss.sharpening": False},
        {
            "method.loss.teacher_temp",
            "method.loss.warmup_teacher_temp",
            "method.loss.warmup_teacher_temp_epochs",
        },
    ),
    "mse": ({"method.loss.kind": "mse"}, set()),
    "cosine": ({"method.loss.kind": "cosine"}, set()),
    "info_nce": ({"method.loss.kind": "info_nce"}, set()),
    "byol": ({"method.kind": "byol"}, set()),
    "moco": ({"method.kind": "moco", "method.queue_size": 32}, set()),
    "swav": ({"method.kind": "swav", "method.queue_size": 8, "method.queue_start_epochs": 0.0}, set()),
    "supervised": ({"method.kind": "supervised"}, set()),
    "mae": ({"method.kind": "mae"}, OF_TOKENS),
    "masked": ({"method.kind": "masked"}, OF_TOKENS),
    "masked blocks": ({"method.kind": "masked", "method.blocks": True}, OF_TOKENS),
}
"""What is switched, and the knobs that this switches off without taking them away."""

ON_DISTRIBUTIONS = {
    "collapse.uniform_entropy",
    "collapse.one_prototype_entropy",
    "collapse.low_kl",
    "collapse.same_targets",
    "collapse.few_prototypes",
}
ON_VECTORS = {"collapse.constant_std"}


def switched(smoke: Trial, changes: dict[str, Any]) -> Trial:
    trial = smoke.but(changes)
    used = {knob: value for knob, value in ALL_IN_USE.items() if knob in trial.flat()}
    if not trial.judged.has_masks or trial.method.kind in ("mae", "masked"):
        used["evals.at_end"] = ["knn", "linear", "low_shot"]
    return trial.but(used)


@pytest.mark.parametrize("switch", ["shapes", *SWITCHES])
def test_every_knob_is_read(switch: str, smoke: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, off = SWITCHES.get(switch, ({}, set()))
    trial = switched(smoke, changes)
    never = unread(trial, tmp_path, monkeypatch) - NOT_READ - off
    # A verdict is on distributions or on vectors, and has bounds for both.
    judged = isinstance(getattr(trial.method, "loss", None), CrossEntropy) or trial.method.kind == "swav"
    assert never == (ON_VECTORS if judged else ON_DISTRIBUTIONS)


@pytest.mark.parametrize(
    ("taught_by", "changes", "knob", "unused"),
    [
        ({"method.kind": "supervised"}, {"method.kind": "distillation"}, "method.checkpoint", ON_DISTRIBUTIONS),
        ({}, {"method.teacher.kind": "frozen"}, "method.teacher.checkpoint", ON_VECTORS),
    ],
    ids=["distillation", "frozen"],
)
def test_every_knob_is_read_where_a_trained_teacher_is_needed(
    taught_by: dict[str, str],
    changes: dict[str, str],
    knob: str,
    unused: set[str],
    smoke: Trial,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "teacher").mkdir()
    list(train(switched(smoke, taught_by), workdir=tmp_path / "teacher"))
    trial = switched(smoke, changes | {knob: str(tmp_path / "teacher" / CHECKPOINT)})
    assert unread(trial, tmp_path, monkeypatch) - NOT_READ == unused


@pytest.mark.parametrize("image_size", [16, None])
def test_every_knob_is_read_where_images_lie_in_files(
    image_size: int | None, smoke: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, name, i in itertools.product(("train", "val"), "ab", range(8)):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (30 * i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    files = {"data.kind": "imagefolder", "data.root": str(tmp_path), "data.image_size": image_size}
    files["data.bad_images"] = "skip"
    trial = switched(smoke, files)
    assert unread(trial, tmp_path, monkeypatch) == NOT_READ | ON_VECTORS | {"evals.attention.mass"}


class WithDeadKnob(DINO):
    dead: float = 1.0


def test_a_knob_that_nobody_reads_is_found(smoke: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = smoke.but(ALL_IN_USE).model_copy(update={"method": WithDeadKnob()})
    assert unread(trial, tmp_path, monkeypatch) == NOT_READ | ON_VECTORS | {"method.dead"}
