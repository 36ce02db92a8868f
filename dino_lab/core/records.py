"""Record, and every name that is logged, with its unit and which way is better. No torch here.

`dino_lab.core` writes these names, `analysis` reads them; they share nothing else.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Better: TypeAlias = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Record:
    """What a trial shows of itself after `step` optimiser steps.

    `verdict` is the collapse verdict on the trial so far and `onset_step` the step at which it began.
    """

    step: int
    epoch: float
    seconds: float
    """Unix time at which the record was made."""
    values: dict[str, float] = field(default_factory=dict)
    verdict: str = "none"
    onset_step: int | None = None


@dataclass(frozen=True)
class Metric:
    """A logged name."""

    name: str
    unit: str
    better: Better
    meaning: str


LOSS = "train/loss"
TEACHER_ENTROPY = "train/teacher_entropy"
KL = "train/kl"
ENTROPY_FRACTION = "train/teacher_entropy_fraction"
MARGINAL_ENTROPY = "train/marginal_entropy"
EMBEDDING_STD = "train/embedding_std"
OUTPUT_STD = "train/output_std"
GRADIENT_NORM = "train/gradient_norm"
CENTER_NORM = "center/norm"
LR = "schedule/lr"
WEIGHT_DECAY = "schedule/weight_decay"
MOMENTUM_TEACHER = "schedule/momentum_teacher"
TEACHER_TEMP = "schedule/teacher_temp"
IMAGES_PER_SECOND = "runtime/images_per_second"
TRAIN_MINUTES = "runtime/train_minutes"
PEAK_MEMORY = "runtime/peak_memory_mib"
KNN = "eval/knn_top1"
STUDENT_KNN = "eval/student_knn_top1"
PIXELS_KNN = "eval/pixels_knn_top1"
FACTOR_KNN = "factor/knn_top1_"
"""Prefix; the name of the factor follows."""
FACTOR_PIXELS_KNN = "factor/pixels_knn_top1_"
"""Prefix; the name of the factor follows."""

TIMINGS = frozenset({IMAGES_PER_SECOND, TRAIN_MINUTES, PEAK_MEMORY})
"""Names whose values differ from run to run; all others are the same bits for the same trial on CPU."""

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            LOSS, "nats", "lower", "the method's loss; of DINO the cross-entropy, mean over pairs of different crops"
        ),
        Metric(TEACHER_ENTROPY, "nats", "neither", "entropy of the teacher's targets; 0 is one-hot, ln K is uniform"),
        Metric(KL, "nats", "neither", "KL(teacher || student) over the same pairs; loss = teacher entropy + KL"),
        Metric(ENTROPY_FRACTION, "of ln K", "neither", "teacher entropy as a fraction of ln K"),
        Metric(MARGINAL_ENTROPY, "nats", "higher", "entropy of the mean target over the batch"),
        Metric(EMBEDDING_STD, "1", "higher", "std over the batch of the teacher's l2-normalised features, x sqrt(D)"),
        Metric(OUTPUT_STD, "1", "higher", "the same of the outputs that a loss without targets compares, x sqrt(K)"),
        Metric(
            GRADIENT_NORM,
            "1",
            "neither",
            "l2 norm of the student's gradient before clipping, a held last layer left out",
        ),
        Metric(CENTER_NORM, "1", "neither", "l2 norm of the centre"),
        Metric(LR, "1", "neither", "learning rate of this step"),
        Metric(WEIGHT_DECAY, "1", "neither", "weight decay of this step"),
        Metric(MOMENTUM_TEACHER, "1", "neither", "weight of the old teacher in its update"),
        Metric(TEACHER_TEMP, "1", "neither", "teacher temperature of this epoch"),
        Metric(IMAGES_PER_SECOND, "images/s", "higher", "training images a second since the last record"),
        Metric(TRAIN_MINUTES, "min", "lower", "time in the training steps so far, over all attempts"),
        Metric(
            PEAK_MEMORY, "MiB", "lower", "largest memory of the trial's process in its steps; on CUDA, of the device"
        ),
        Metric(
            KNN,
            "%",
            "higher",
            "weighted k-NN of the class on held-out images, teacher features, or the student's if it has none",
        ),
        Metric(STUDENT_KNN, "%", "higher", "the same with the student's features"),
        Metric(PIXELS_KNN, "%", "higher", "the same with raw pixels"),
    )
}


def metric(name: str) -> Metric:
    """The unit, direction and meaning of a logged name; factor names are made of their prefix."""
    for prefix, features in ((FACTOR_KNN, "teacher features"), (FACTOR_PIXELS_KNN, "raw pixels")):
        if name.startswith(prefix):
            factor = name.removeprefix(prefix)
            return Metric(name, "%", "higher", f"weighted k-NN of the factor {factor} on held-out images, {features}")
    return METRICS[name]
