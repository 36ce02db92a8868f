"""Record, and every name that is logged, with its unit and which way is better. No torch here.

`dino_lab.core` writes these names, `analysis` reads them; they share nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Better: TypeAlias = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Record:
    """What a trial shows of itself after `step` optimiser steps.

    `verdict` is the collapse verdict on the trial so far and `onset_step` the step at which it began; `left` has the
    collapses that were called before and taken back: kind, first and last step.
    """

    step: int
    epoch: float
    seconds: float
    """Unix time at which the record was made."""
    values: dict[str, float] = field(default_factory=dict)
    verdict: str = "none"
    onset_step: int | None = None
    left: Sequence[tuple[str, int, int]] = ()


VERDICTS = {
    "none": "no collapse",
    "not_started": "nothing has moved: the networks show of images what they showed at the start",
    "uniform": "every target is flat, and the student has followed",
    "one_prototype": "every image has the same one-hot target, and the student has followed",
    "few_prototypes": "targets are sharp, and all of them on two or three prototypes",
    "constant": "every image has the same target or output, whatever it is",
    "dimensional": "targets differ, but the outputs that they are made of lie on a line",
    "diverged": "the loss is not finite",
}
"""What each verdict means."""
COLLAPSES = ("uniform", "one_prototype", "few_prototypes", "constant", "dimensional")
"""The verdicts that are collapses."""


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
GRADIENT_NORM = "train/gradient_norm"
GRADIENT_NORM_OF = "train/gradient_norm_"
"""Prefix; the part of the student follows."""
PROTOTYPES_NUMBER = "targets/prototypes_number"
MARGINAL_ENTROPY = "targets/marginal_entropy"
MUTUAL_INFORMATION = "targets/mutual_information"
PROTOTYPES_IN_USE = "targets/prototypes_in_use"
PROTOTYPES_PERPLEXITY = "targets/prototypes_perplexity"
LARGEST_SHARE = "targets/largest_share"
AGREEMENT = "targets/agreement"
EMBEDDING_STD = "features/embedding_std"
EMBEDDING_RANK = "features/embedding_rank"
EMBEDDING_SPECTRUM = "features/embedding_spectrum_"
"""Prefix; the place of the singular value follows."""
OUTPUT_STD = "features/output_std"
OUTPUT_RANK = "features/output_rank"
OUTPUT_SPECTRUM = "features/output_spectrum_"
"""Prefix; the place of the singular value follows."""
CENTER_NORM = "center/norm"
CENTER_SHARE = "center/share_of_logits"
TEACHER_DISTANCE = "teacher/distance"
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
TEACHER_MINUS_STUDENT = "eval/teacher_minus_student_knn"
KNN_OF = "eval/knn_top1_"
"""Prefix; another number of neighbours follows."""
LINEAR = "eval/linear_top1"
LINEAR_RATE = "eval/linear_learning_rate"
LOW_SHOT = "eval/low_shot_top1_"
"""Prefix; the percent of labels follows."""
RETRIEVAL = "eval/retrieval_map"
JACCARD = "eval/jaccard_"
"""Prefix; the percent of attention that a mask holds follows."""
EVALUATED_RANK = "eval/embedding_rank"
STUDENT = "eval/student_"
"""In place of eval/, of the student's features; the rest of the name follows."""
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
        Metric(
            GRADIENT_NORM,
            "1",
            "neither",
            "l2 norm of the student's gradient before clipping, a held last layer left out",
        ),
        Metric(PROTOTYPES_NUMBER, "1", "neither", "K, the dimension of the targets"),
        Metric(MARGINAL_ENTROPY, "nats", "higher", "entropy of the mean target over the last K targets or so"),
        Metric(
            MUTUAL_INFORMATION,
            "nats",
            "higher",
            "what a target says of its image: entropy of the batch's mean target minus theirs",
        ),
        Metric(PROTOTYPES_IN_USE, "1", "higher", "prototypes that were the largest of one of the last K targets or so"),
        Metric(PROTOTYPES_PERPLEXITY, "1", "higher", "exp of the entropy of how often each was the largest"),
        Metric(LARGEST_SHARE, "1", "lower", "fraction of targets whose largest prototype is the most frequent one"),
        Metric(AGREEMENT, "1", "neither", "fraction of pairs of crops where teacher and student have the same largest"),
        Metric(EMBEDDING_STD, "1", "higher", "std over the batch of the teacher's l2-normalised features, x sqrt(D)"),
        Metric(EMBEDDING_RANK, "1", "higher", "effective rank of the teacher's features of a batch, at most 2 B"),
        Metric(OUTPUT_STD, "1", "higher", "std over the batch of what the loss compares, of length 1, x sqrt(K)"),
        Metric(OUTPUT_RANK, "1", "higher", "effective rank of the teacher's outputs of a batch, at most 2 B"),
        Metric(CENTER_NORM, "1", "neither", "l2 norm of the centre"),
        Metric(CENTER_SHARE, "1", "neither", "l2 norm of the centre over the mean norm of the teacher's logits"),
        Metric(TEACHER_DISTANCE, "1", "neither", "l2 distance of teacher and student weights over the student's norm"),
        Metric(LR, "1", "neither", "learning rate of this step"),
        Metric(WEIGHT_DECAY, "1", "neither", "weight decay of this step"),
        Metric(MOMENTUM_TEACHER, "1", "neither", "weight of the old teacher in its update"),
        Metric(TEACHER_TEMP, "1", "neither", "teacher temperature of this epoch"),
        Metric(IMAGES_PER_SECOND, "images/s", "higher", "training images a second since the last record"),
        Metric(TRAIN_MINUTES, "min", "lower", "time in the training steps so far, over all attempts"),
        Metric(
            PEAK_MEMORY, "MiB", "lower", "largest memory of a process of the trial in its steps; on CUDA, of a device"
        ),
        Metric(
            KNN,
            "%",
            "higher",
            "weighted k-NN of the class on held-out images, teacher features, or the student's if it has none",
        ),
        Metric(STUDENT_KNN, "%", "higher", "the same with the student's features"),
        Metric(PIXELS_KNN, "%", "higher", "the same with raw pixels"),
        Metric(TEACHER_MINUS_STUDENT, "points", "neither", "k-NN with the teacher's features minus the student's"),
        Metric(LINEAR, "%", "higher", "linear probe of the class on frozen features, held-out images"),
        Metric(LINEAR_RATE, "1", "neither", "its learning rate, chosen on a part of the training images"),
        Metric(RETRIEVAL, "%", "higher", "mean average precision of the class: held-out images search the others"),
        Metric(EVALUATED_RANK, "1", "higher", "effective rank of the features of all held-out images"),
    )
}

_OF_A_FACTOR = "weighted k-NN of the factor {} on held-out images, "
_FAMILIES: tuple[tuple[str, str, Better, str], ...] = (
    (FACTOR_KNN, "%", "higher", _OF_A_FACTOR + "teacher features"),
    (FACTOR_PIXELS_KNN, "%", "higher", _OF_A_FACTOR + "raw pixels"),
    (KNN_OF, "%", "higher", "weighted k-NN of the class with {} neighbours"),
    (LOW_SHOT, "%", "higher", "logistic regression of the class on {} % of the labels"),
    (JACCARD, "%", "higher", "Jaccard index of objects and the attention of the best head, {} % of its mass"),
    (GRADIENT_NORM_OF, "1", "neither", "the same of the student's {} alone"),
    (EMBEDDING_SPECTRUM, "1", "neither", "singular value {} of the teacher's features, over the largest"),
    (OUTPUT_SPECTRUM, "1", "neither", "singular value {} of the teacher's outputs, over the largest"),
)
"""Names that are made of a prefix and of what follows it, which stands in their meaning."""


def metric(name: str) -> Metric:
    """The unit, direction and meaning of a logged name."""
    if name.startswith(STUDENT) and name not in METRICS:
        whole = metric(name.replace(STUDENT, "eval/"))
        return Metric(name, whole.unit, whole.better, f"{whole.meaning}; of the student")
    for prefix, unit, better, meaning in _FAMILIES:
        if name.startswith(prefix) and name not in METRICS:
            return Metric(name, unit, better, meaning.format(name.removeprefix(prefix)))
    return METRICS[name]
