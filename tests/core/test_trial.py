"""Trial: rules across sections, and that every knob is read."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dino_lab.core.methods.dino import DINO
from dino_lab.core.settings import KnobError, Settings
from dino_lab.core.trainer import train
from dino_lab.core.trial import Trial

READ_BY_THE_RUNNER = {"runtime.cpus", "runtime.gpus", "runtime.memory_gib"}

# Every branch on: the operations of crops, the bounds of a collapse, a warm-up of the teacher's temperature.
ALL_IN_USE = {
    "crops.blur_probability": [0.5, 0.5, 0.5],
    "crops.solarize_probability": [0.5, 0.5, 0.5],
    "crops.grayscale_probability": 0.5,
    "crops.jitter_probability": 0.8,
    "collapse.uniform_entropy": 1.0,
    "collapse.one_prototype_entropy": 0.99,
    "collapse.low_kl": 1e6,
    "method.warmup_teacher_temp_epochs": 1,
    "runtime.log_period_steps": 1,
    "evals.knn.bank_images": 48,
}


# Whatever `smoke` becomes.
SIZE = {"epochs": 2, "data.train_images": 48}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 49}, r"batch_size = 49: exceeds the 48 images of data"),
        ({"optimizer.warmup_epochs": 2.5}, r"optimizer\.warmup_epochs = 2\.5: exceeds epochs = 2"),
        ({"method.warmup_teacher_temp_epochs": 3}, r"method\.warmup_teacher_temp_epochs = 3: exceeds epochs = 2"),
        ({"crops.global_crops_size": 20}, r"crops\.global_crops_size = 20: must be a multiple of .* 8"),
        ({"crops.local_crops_size": 12}, r"crops\.local_crops_size = 12: must be a multiple of .* 8"),
        ({"runtime.gpus": 0.5}, r"runtime\.gpus = 0\.5: runtime\.device is 'cpu'"),
        ({"precision": "f16"}, r"precision = 'f16': .*'f32' or 'bf16'"),
        ({"data.kind": "cifra10"}, r"data.*'shapes', 'digits'"),
        ({"method.teacher_tmp": 0.1}, r"unknown knob 'method\.teacher_tmp'; did you mean 'method\.teacher_temp'"),
        ({"teacher_temp": 0.1}, r"unknown knob 'teacher_temp'; did you mean 'method\.teacher_temp'"),
    ],
)
def test_a_trial_that_cannot_be_run_is_refused(smoke: Trial, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KnobError, match=message):
        smoke.but(SIZE).but(changes)


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
    assert smoke.but({"runtime.cpus": 4, "runtime.loader_workers": 2}).identity == smoke.identity
    others = {"seed": 1, "precision": "bf16", "method.centering": False, "evals.every_epochs": 7, "data.image_size": 40}
    assert len({smoke.but({knob: value}).identity for knob, value in others.items()} | {smoke.identity}) == 6


# -------------------------------------------------------------------------------------------------- dead knobs


def knobs(settings: Settings, prefix: str = "") -> Iterator[tuple[str, type[Settings], str]]:
    """Path, class and field of every knob."""
    for name, value in settings:
        if isinstance(value, Settings):
            yield from knobs(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", type(settings), name


def unread(trial: Trial, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The knobs that two steps of this trial never look at."""
    read: set[tuple[type[Settings], str]] = set()
    every = list(knobs(trial))
    plain = Settings.__getattribute__

    def watched(self: Settings, name: str) -> Any:
        read.add((type(self), name))
        return plain(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Settings, "__getattribute__", watched)
        list(itertools.islice(train(trial, workdir=workdir), 3))
    return {path for path, owner, name in every if (owner, name) not in read}


@pytest.mark.parametrize("kind", ["shapes", "digits"])
def test_every_knob_is_read(kind: str, smoke: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = smoke.but({"data.kind": kind} | ALL_IN_USE)
    assert unread(trial, tmp_path, monkeypatch) == READ_BY_THE_RUNNER


class WithDeadKnob(DINO):
    dead: float = 1.0


def test_a_knob_that_nobody_reads_is_found(smoke: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = smoke.but(ALL_IN_USE).model_copy(update={"method": WithDeadKnob()})
    assert unread(trial, tmp_path, monkeypatch) == READ_BY_THE_RUNNER | {"method.dead"}
