"""Knob linter: what is known to go wrong with these settings, by whom, and whether it did so in our own trials. Pure.

A rule is a function of a trial, or of a trial and the number of its training images, and finds something or nothing.
It is silent where the method has not the knobs that it is about.

Sources: tables, sections and appendices are of DINO (arXiv:2104.14294), help texts of its main_dino.py. k-NN accuracies
"here" are of two seeds in experiments/README.md, where the untrained network has 36 % and DINO 99.5 and 98.8 %; onsets
are by the verdict's rules of that day.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dino_lab.core.data.draws import View
from dino_lab.core.data.embedded import Shapes
from dino_lab.core.methods.byol import BYOL
from dino_lab.core.methods.dino import DINO
from dino_lab.core.methods.losses import MSE, Cosine, CrossEntropy
from dino_lab.core.methods.moco import MoCo
from dino_lab.core.methods.operations import Centering, NoOperation, Sinkhorn, SoftmaxBatch
from dino_lab.core.methods.swav import SwAV
from dino_lab.core.networks.head import BottleneckHeadSettings, MLPHeadSettings, NoPredictor
from dino_lab.core.networks.teacher import Momentum, PreviousIteration, StudentCopy
from dino_lab.core.optimizers import AdamW
from dino_lab.core.settings import Knob
from dino_lab.core.trial import Trial

Severity: TypeAlias = Literal["warning", "note"]

HOT_START = 0.06
"""Teacher temperature of the first epoch: 0.06 costs the paper a point of k-NN and 0.08 all of it (Appendix D)."""
HOT = 0.07
"""Teacher temperature after a warm-up: the paper's best, above which the reference calls it unstable."""
COLD = 0.02
"""Teacher temperature that costs the paper 3 points of k-NN (Appendix D)."""
SOFT_STUDENT = 0.2
"""Student temperature: twice the paper's, and the least above it that was tried here."""
SLOW_CENTER = 0.999
"""Centre momentum that collapses in the paper, though in a run of 100,000 steps and more it lags by a hundredth."""
CENTER_LAG = 0.1
"""Part of the run by which a centre may lag: a fifth collapsed here, a twentieth did not."""
FAST_TEACHER = 0.9
"""Momentum at which the teacher is the mean of ten steps; it collapsed here, 0.98 did not."""
TEACHER_LAG = 0.25
"""Part of the run over which a teacher may be averaged: half of it cost 35 points here, a fifth 9."""
SMALL_BATCH, SMALL_BATCH_MOMENTUM = 256, 0.9995
"""The reference's example of a small batch, and its momentum for it."""
SHORT_RUN_STEPS = 2000
"""A teacher that comes to a halt cost 28 points here in 500 steps; the paper's runs have 100,000 and more."""
FAR_MORE_PROTOTYPES = 10
"""Prototypes for each image: an order beyond what was tried here. ImageNet has twenty images for each."""
PROTOTYPES_PER_TARGET = 32
"""Prototypes for each target that is evened out with others: the paper has 65,536 for 2 x 1,024 (Table 15)."""
HIGH_LR, LOW_LR = 0.004, 1e-4
"""Learning rates of AdamW at their highest; the published recipes have 0.001 to 0.003."""
WIDE_SCALE = 0.14
"""Smallest area of global crops, as a fraction, that the reference advises where there are no local ones."""
SMALL_PATCH = 16
"""Side in pixels below which the reference advises against half precision."""
DEEP_HEAD = 3
"""Linear layers from which the paper's head collapses without its l2-normalised bottleneck (Appendix C)."""
BLUR = 2 / 96
"""Largest blur of the reference, of its smallest crop: standard deviation over side."""


@dataclass(frozen=True)
class Finding:
    """What one rule has against a trial."""

    rule: str
    """The rule's function."""
    severity: Severity
    """Warning: training is known to fail so, or most of the run to be lost. Note: it is known to be worse, a knob does
    nothing, or advice is not followed."""
    knobs: dict[str, Knob]
    """By dotted path, as the trial has them."""
    reason: str
    source: str
    seen_here: str
    """Whether our own trials agree, with their numbers."""


@dataclass(frozen=True)
class RowsFinding:
    """A finding, and the rows whose trials have it."""

    finding: Finding
    rows: tuple[str, ...]


def lint(trial: Trial, *, train_images: int | None) -> list[Finding]:
    """What is known to go wrong with a trial, warnings first.

    Args:
        train_images: How many images are trained on; None where nobody knows yet, and rules that need it are silent.
    """
    found = [rule(trial) for rule in RULES]
    if train_images is not None and train_images >= trial.batch_size:
        found += [rule(trial, train_images) for rule in RULES_ON_IMAGES]
    return sorted(filter(None, found), key=lambda finding: finding.severity == "note")


def over_rows(rows: Iterable[tuple[str, Trial, int | None]]) -> list[RowsFinding]:
    """The findings of labelled trials, each once with the rows that have it; warnings first, then by rule.

    Args:
        rows: Label, trial and number of training images; seeds of a row have the same label.
    """
    labels: list[tuple[Finding, list[str]]] = []
    for label, trial, train_images in rows:
        for finding in lint(trial, train_images=train_images):
            known = next((its for other, its in labels if other == finding), None)
            if known is None:
                labels.append((finding, [label]))
            elif label not in known:
                known.append(label)
    order = [rule.__name__ for rule in (*RULES, *RULES_ON_IMAGES)]
    labels.sort(key=lambda each: (each[0].severity == "note", order.index(each[0].rule)))
    return [RowsFinding(finding, tuple(its)) for finding, its in labels]


def about_train_images(trial: Trial) -> int | None:
    """How many images are trained on, about, if that is known without reading them."""
    data = trial.data
    listed = data.listed_train_images
    if listed is None or data.classes is not None or data.evaluation_split != "test":
        return None
    return round(listed * data.fraction)


# ------------------------------------------------------------------------------------------------- temperatures


def hot_start(trial: Trial) -> Finding | None:
    temps = _temperatures(trial)
    if temps is None or not temps.sharpening or temps.teacher_temp_at(0) <= HOT_START:
        return None
    return Finding(
        rule="hot_start",
        severity="warning",
        knobs=_knobs(trial, *_TEACHER_TEMPS),
        reason=f"The teacher starts at a temperature of {temps.teacher_temp_at(0):g}; above {HOT_START} without a "
        "warm-up its targets become uniform: 0.08 has a k-NN of 0.1 %, 0.04 warmed up to 0.07 has 69.7.",
        source="Appendix D; main_dino.py --teacher_temp; facebookresearch/dino#61 (0.3 and no warm-up: the loss does "
        "not fall)",
        seen_here="Holds: 0.08 is uniform from step 140 and 100 (41.2, 38.4), 0.06 has 93.4 and 64.7, 0.04 warmed up "
        "to 0.07 has 97.0 and 96.6.",
    )


def hot_teacher(trial: Trial) -> Finding | None:
    temps = _temperatures(trial)
    if temps is None or not temps.sharpening or temps.teacher_temp <= HOT or temps.teacher_temp_at(0) > HOT_START:
        return None
    return Finding(
        rule="hot_teacher",
        severity="warning",
        knobs=_knobs(trial, *_TEACHER_TEMPS),
        reason=f"The teacher ends at a temperature of {temps.teacher_temp:g}: above {HOT} most runs are unstable, "
        "warmed up or not.",
        source="main_dino.py --teacher_temp",
        seen_here="Holds in part: 0.04 warmed up to 0.1 has 90.9 and 85.7, and is uniform from step 300 in one seed.",
    )


def cold_teacher(trial: Trial) -> Finding | None:
    temps = _temperatures(trial)
    if temps is None or not temps.sharpening or temps.teacher_temp > COLD:
        return None
    return Finding(
        rule="cold_teacher",
        severity="note",
        knobs=_knobs(trial, "method.loss.teacher_temp"),
        reason="The colder the teacher, the nearer its targets are to arg-max: 0.02 has a k-NN of 66.7 %, 0 one of "
        "43.9, 0.04 one of 69.6.",
        source="Appendix D",
        seen_here="Holds: 0.02 has 70.4 and 27.2, 0 has 69.5 and 22.3, and one seed of it collapses.",
    )


def unused_warmup_temp(trial: Trial) -> Finding | None:
    temps = _temperatures(trial)
    if temps is None or not temps.sharpening or temps.warmup_teacher_temp_epochs:
        return None
    if temps.warmup_teacher_temp in (temps.teacher_temp, CrossEntropy().warmup_teacher_temp):
        return None
    return Finding(
        rule="unused_warmup_temp",
        severity="note",
        knobs=_knobs(trial, *_TEACHER_TEMPS),
        reason=f"A warm-up of 0 epochs never uses its temperature of {temps.warmup_teacher_temp:g}: the teacher has "
        f"{temps.teacher_temp:g} from the start.",
        source="main_dino.py, DINOLoss; facebookresearch/dino#61 (0.0005) and #273 (0.00002) set it so",
        seen_here="Holds: by definition.",
    )


def no_sharpening(trial: Trial) -> Finding | None:
    temps = _temperatures(trial)
    if temps is None or temps.sharpening:
        return None
    return Finding(
        rule="no_sharpening",
        severity="warning",
        knobs=_knobs(trial, "method.loss.sharpening", "method.loss.student_temp"),
        reason="Without a temperature of its own the teacher is no sharper than the student, and targets become "
        "uniform: entropy rises to ln K and KL falls to 0.",
        source="Section 5.3 and Figure 7",
        seen_here="Holds: uniform in 3 seeds of 3, from step 100 to 120.",
    )


def student_not_softer(trial: Trial) -> Finding | None:
    temps = _temperatures(trial)
    if temps is None or not temps.sharpening:
        return None
    hottest = max(temps.teacher_temp, temps.teacher_temp_at(0))
    if temps.student_temp > hottest:
        return None
    return Finding(
        rule="student_not_softer",
        severity="warning",
        knobs=_knobs(trial, "method.loss.student_temp", *_TEACHER_TEMPS),
        reason=f"The student's temperature of {temps.student_temp:g} is not above the teacher's {hottest:g}: nothing "
        "is sharpened, and centring alone makes targets uniform.",
        source="Section 5.3 and Figure 7; the paper has 0.1 and 0.04 to 0.07",
        seen_here="Holds: 0.04 for both is uniform from step 140 and 120 (40.2, 40.2).",
    )


def soft_student(trial: Trial) -> Finding | None:
    temps = _temperatures(trial)
    if temps is None or temps.student_temp < SOFT_STUDENT:
        return None
    return Finding(
        rule="soft_student",
        severity="note",
        knobs=_knobs(trial, "method.loss.student_temp"),
        reason=f"A student's temperature of {temps.student_temp:g} is twice the paper's 0.1 or more, which no "
        "published run has left.",
        source="experiments/README.md; section 3.2 for the 0.1",
        seen_here="Found here: 0.2 has 26.7 and 19.7, 0.4 has 35.5 and 27.5, and one seed of it collapses.",
    )


# ------------------------------------------------------------------------------------------------------- centre


def no_centering(trial: Trial) -> Finding | None:
    temps = _temperatures(trial)
    if temps is None or not isinstance(trial.method, DINO) or not isinstance(trial.method.operation, NoOperation):
        return None
    return Finding(
        rule="no_centering",
        severity="warning",
        knobs=_knobs(trial, "method.operation.kind"),
        reason="With nothing done to the teacher's logits one prototype takes over: entropy and KL fall to 0.",
        source="Section 5.3 and Figure 7",
        seen_here="Holds: one_prototype in 3 seeds of 3, from step 50 to 90.",
    )


def slow_center(trial: Trial) -> Finding | None:
    center = _centering(trial)
    if center is None or center.center_momentum < SLOW_CENTER:
        return None
    return Finding(
        rule="slow_center",
        severity="warning",
        knobs=_knobs(trial, "method.operation.center_momentum"),
        reason=f"A centre momentum of {center.center_momentum:g} follows {_steps_behind(center.center_momentum)}; "
        "0.999 collapses (k-NN 0.1 %), 0.99 does not (69.4).",
        source="Appendix D",
        seen_here="Holds: 0.999 is one_prototype from step 50 and 120 of 500 (36.0, 37.2), and from step 1,620 and 980 "
        "of 2,000.",
    )


def center_behind_run(trial: Trial, images: int) -> Finding | None:
    center, steps = _centering(trial), _steps(trial, images)
    if center is None or center.center_momentum >= SLOW_CENTER:
        return None
    if not lags(center.center_momentum, steps, part=CENTER_LAG):
        return None
    return Finding(
        rule="center_behind_run",
        severity="warning",
        knobs=_knobs(trial, "method.operation.center_momentum", "epochs", "batch_size"),
        reason=f"The centre follows {_steps_behind(center.center_momentum)}, and the run has {steps:,}: one prototype "
        "takes over before the centre has followed.",
        source="experiments/README.md; in the paper's 100,000 steps and more 0.99 is as good as 0.9 (Appendix D)",
        seen_here="Found here: 0.99 is one_prototype from step 300 and 280 of 500 (31.9, 35.2); with everything four "
        "times as slow, in 2,000 steps, it is not (99.8, 99.9).",
    )


# ------------------------------------------------------------------------------------------------------ teacher


def no_momentum_teacher(trial: Trial) -> Finding | None:
    teacher, center = getattr(trial.method, "teacher", None), _centering(trial)
    momentum = isinstance(teacher, Momentum) and teacher.momentum_teacher <= FAST_TEACHER
    if center is None or not (momentum or isinstance(teacher, StudentCopy | PreviousIteration)):
        return None
    return Finding(
        rule="no_momentum_teacher",
        severity="warning",
        knobs=_knobs(trial, "method.teacher.momentum_teacher" if momentum else "method.teacher.kind"),
        reason="A teacher that is the student, or its mean over ten steps or fewer, collapses with centring: a copy of "
        "the student, or the student of one step before, has a k-NN of 0.1 %.",
        source="Table 7, Figure 6 and Table 15; facebookresearch/dinov2#407 (one network served as both, among other "
        "mistakes: the loss stayed at ln 4,096)",
        seen_here="Holds: a copy has 17.8 and 19.0, one step before 27.6 and 24.1, a momentum of 0.9 16.6 and 16.7; "
        "0.98 has 99.5 and 98.8.",
    )


def no_momentum_evened(trial: Trial) -> Finding | None:
    if not isinstance(trial.method, DINO) or not isinstance(trial.method.operation, SoftmaxBatch | Sinkhorn):
        return None
    if not isinstance(trial.method.teacher, StudentCopy | PreviousIteration):
        return None
    return Finding(
        rule="no_momentum_evened",
        severity="note",
        knobs=_knobs(trial, "method.teacher.kind", "method.operation.kind", "batch_size"),
        reason="Without a momentum teacher, evening out prototypes over the batch is all that stands against collapse, "
        "and a small batch says little of them.",
        source="experiments/README.md; with the paper's 1,024 images it works: 72.2 and 71.8 % linear (Table 15)",
        seen_here="Found here: softmax over the batch is uniform from step 170 and 90 (44.9, 22.4), Sinkhorn has 39.1 "
        "and 99.7.",
    )


def teacher_behind_run(trial: Trial, images: int) -> Finding | None:
    teacher, steps = _momentum(trial), _steps(trial, images)
    if teacher is None or not lags(teacher.momentum_teacher, steps, part=TEACHER_LAG):
        return None
    return Finding(
        rule="teacher_behind_run",
        severity="warning",
        knobs=_knobs(trial, "method.teacher.momentum_teacher", "epochs", "batch_size"),
        reason=f"The teacher follows {_steps_behind(teacher.momentum_teacher)}, and the run has {steps:,}: it stays "
        "near the weights of the start.",
        source="experiments/README.md; facebookresearch/dino#246 (a user's loss fell only with 0.99 in place of 0.996)",
        seen_here="Found here, in 500 steps: 0.98 has 99.5 and 98.8, 0.99 92.2 and 88.1, 0.996 67.9 and 60.1, 1 36.4 "
        "and 35.6.",
    )


def teacher_halts(trial: Trial, images: int) -> Finding | None:
    teacher, steps = _momentum(trial), _steps(trial, images)
    if teacher is None or steps > SHORT_RUN_STEPS or not teacher.momentum_teacher < teacher.momentum_teacher_end == 1:
        return None
    return Finding(
        rule="teacher_halts",
        severity="note",
        knobs=_knobs(trial, "method.teacher.momentum_teacher", "method.teacher.momentum_teacher_end", "epochs"),
        reason=f"A momentum that rises to 1 brings the teacher to a halt, and a run of {steps:,} steps has none to "
        "spare.",
        source="experiments/README.md; the paper's rise to 1 is of 100,000 steps and more (section 3.2)",
        seen_here="Found here, in 500 steps: 0.98 to 1 has 73.4 and 68.1, 0.98 throughout 99.5 and 98.8.",
    )


def small_batch_momentum(trial: Trial, images: int) -> Finding | None:
    teacher, steps = _momentum(trial), _steps(trial, images)
    if teacher is None or trial.batch_size > SMALL_BATCH or teacher.momentum_teacher >= SMALL_BATCH_MOMENTUM:
        return None
    # Advice that would put the teacher behind the run is none.
    if _centering(trial) is None or lags(SMALL_BATCH_MOMENTUM, steps, part=TEACHER_LAG):
        return None
    return Finding(
        rule="small_batch_momentum",
        severity="note",
        knobs=_knobs(trial, "method.teacher.momentum_teacher", "epochs", "batch_size"),
        reason=f"Small batches need a slower teacher: the reference advises {SMALL_BATCH_MOMENTUM} for {SMALL_BATCH} "
        f"images, and this run's {steps:,} steps have room for it.",
        source="main_dino.py --momentum_teacher; facebookresearch/dino#104 (its author, of small batches)",
        seen_here="Not seen at 500 steps of 16 images, where 0.99 is worse than 0.98 (92.2, 88.1); longer runs were "
        "not tried.",
    )


# --------------------------------------------------------------------------------------------------- prototypes


def many_prototypes(trial: Trial, images: int) -> Finding | None:
    if isinstance(trial.method, SwAV):
        knob, number = "method.prototypes_number", trial.method.prototypes_number
    elif isinstance(trial.method, DINO) and _temperatures(trial):
        knob, number = "method.head.out_dim", trial.method.head.out_dim
    else:
        return None
    if number <= images:
        return None
    return Finding(
        rule="many_prototypes",
        severity="warning" if number > FAR_MORE_PROTOTYPES * images else "note",
        knobs=_knobs(trial, knob),
        reason=f"{number:,} prototypes for {images:,} images, {number / images:.2g} for each: so many serve large and "
        "complex data, ImageNet has one for 20 images.",
        source="main_dino.py --out_dim; facebookresearch/dinov2#149 (an author: more for larger data); "
        "facebookresearch/dino#279 (with fewer the loss falls) and #273 (1,000 images)",
        seen_here="Does not hold for 1.3 an image: 256 prototypes for 200 images have 93.5 and 98.6. More were not "
        "tried.",
    )


def few_targets_evened(trial: Trial) -> Finding | None:
    method, parts = trial.method, trial.accumulation_steps
    if isinstance(method, SwAV):
        knobs = ["method.prototypes_number", "method.queue_size"]
        prototypes, targets = method.prototypes_number, trial.batch_size // parts + method.queue_size
    elif isinstance(method, DINO) and isinstance(method.operation, SoftmaxBatch | Sinkhorn):
        knobs = ["method.operation.kind", "method.head.out_dim", "crops.global_crops_number"]
        prototypes = method.head.out_dim
        targets = trial.crops.global_crops_number * trial.batch_size // parts
    else:
        return None
    if prototypes <= PROTOTYPES_PER_TARGET * targets:
        return None
    return Finding(
        rule="few_targets_evened",
        severity="note",
        knobs=_knobs(trial, *knobs, "batch_size", "accumulation_steps"),
        reason=f"{targets:,} targets are evened out over {prototypes:,} prototypes, {prototypes / targets:.0f} for "
        "each; the fewer targets, the less there is to even out.",
        source="SwAV (arXiv:2006.09882), on small batches and its queue; facebookresearch/swav#118 (16 for 1,500). "
        f"The paper has {PROTOTYPES_PER_TARGET} for each (Table 15)",
        seen_here="Does not hold for 8 to 16 for each and a momentum teacher or SwAV (Sinkhorn 98.0 and 99.3, SwAV "
        "99.7 and 99.5). More were not tried.",
    )


# --------------------------------------------------------------------------------------------------------- loss


def no_temperatures(trial: Trial) -> Finding | None:
    if not isinstance(trial.method, DINO) or not isinstance(trial.method.loss, MSE | Cosine):
        return None
    return Finding(
        rule="no_temperatures",
        severity="note",
        knobs=_knobs(trial, "method.loss.kind"),
        reason="A distance of normalised outputs has no temperatures, and so no sharpening: MSE in place of "
        "cross-entropy costs 20 points of k-NN (52.6 against 72.8 %).",
        source="Table 7",
        seen_here="Holds, by less: MSE has 88.4 and 95.7, the dot product 91.6 and 96.7, cross-entropy 99.5 and 98.8.",
    )


def nothing_against_constant(trial: Trial) -> Finding | None:
    method = trial.method
    if isinstance(method, DINO):
        bare = isinstance(method.loss, MSE | Cosine) and isinstance(method.operation, NoOperation)
        knobs = ["method.loss.kind", "method.operation.kind"]
    else:
        bare, knobs = isinstance(method, BYOL), []
    if not bare or not isinstance(getattr(method, "predictor", None), NoPredictor):
        return None
    return Finding(
        rule="nothing_against_constant",
        severity="warning",
        knobs=_knobs(trial, *knobs, "method.predictor.kind"),
        reason="With neither predictor nor centre nor negatives all images get the same output: 0.1 % linear, batch "
        "normalisation or not.",
        source="Table 14, row 8",
        seen_here="Holds in time: BYOL without predictor has 46.9 and 56.0 after 500 steps, with outputs that shrink, "
        "and is constant from step 1,130 and 1,220 of 2,000.",
    )


# --------------------------------------------------------------------------------------------------------- head


def deep_plain_head(trial: Trial) -> Finding | None:
    if not isinstance(trial.method, DINO) or not isinstance(trial.method.head, MLPHeadSettings):
        return None
    if _temperatures(trial) is None or trial.method.head.layers_number < DEEP_HEAD:
        return None
    return Finding(
        rule="deep_plain_head",
        severity="warning",
        knobs=_knobs(trial, "method.head.kind", "method.head.layers_number"),
        reason=f"A head of {trial.method.head.layers_number} layers without the l2-normalised bottleneck: 3 and 4 "
        "collapse (k-NN 0.1 %), 1 and 2 do not (61.6, 62.9).",
        source="Appendix C",
        seen_here="Holds for 4 layers, uniform from step 10 (24.9, 22.7); 3 have 86.6 and 26.2, and collapse at four "
        "times the learning rate.",
    )


def last_layer_held(trial: Trial) -> Finding | None:
    head = getattr(trial.method, "head", None)
    if isinstance(trial.method, SwAV):
        knob, held = "method.freeze_prototypes_epochs", trial.method.freeze_prototypes_epochs
    elif isinstance(head, BottleneckHeadSettings):
        knob, held = "method.head.freeze_last_layer_epochs", head.freeze_last_layer_epochs
    else:
        return None
    if held <= trial.epochs / 2:
        return None
    part = "all" if held >= trial.epochs else "more than half"
    return Finding(
        rule="last_layer_held",
        severity="warning",
        knobs=_knobs(trial, knob, "epochs"),
        reason=f"Prototypes are held for {held:g} of {trial.epochs} epochs, {part} of the run: the reference holds "
        "them for 1 of 100.",
        source="main_dino.py --freeze_last_layer",
        seen_here="Holds in part: all of the run has 93.7 and 65.3, three quarters 93.1 and 67.2; none collapses.",
    )


def free_lengths(trial: Trial) -> Finding | None:
    head = getattr(trial.method, "head", None)
    large = re.search(r"_(base|large|huge|giant)_", trial.backbone.name)
    if not isinstance(head, BottleneckHeadSettings) or head.norm_last_layer or not large:
        return None
    return Finding(
        rule="free_lengths",
        severity="note",
        knobs=_knobs(trial, "method.head.norm_last_layer", "backbone.name"),
        reason="Prototypes whose lengths are learned are better with small backbones and can make large ones unstable: "
        "the reference holds them at 1 for ViT-B.",
        source="main_dino.py --norm_last_layer",
        seen_here="Does not show here: with dimension 384 and 8 blocks 99.0 and 97.4, held at 1 98.5 and 98.1.",
    )


def predictor_on_dino(trial: Trial) -> Finding | None:
    if not isinstance(trial.method, DINO) or isinstance(trial.method.predictor, NoPredictor):
        return None
    if _temperatures(trial) is None:
        return None
    return Finding(
        rule="predictor_on_dino",
        severity="note",
        knobs=_knobs(trial, "method.predictor.kind"),
        reason="A predictor does not help DINO: k-NN 71.8 against 72.8 %.",
        source="Table 7",
        seen_here="Worse here: 67.6 and 25.8, since with it student and teacher start with unrelated outputs; started "
        "as the identity it costs nothing (98.5, 97.6).",
    )


# -------------------------------------------------------------------------------------------------------- crops


def narrow_two_crops(trial: Trial) -> Finding | None:
    if not isinstance(trial.method, DINO | BYOL | MoCo | SwAV) or trial.crops.local_crops_number:
        return None
    narrow = max(trial.crops.global_1.scale[0], trial.crops.global_2.scale[0])
    if narrow <= WIDE_SCALE:
        return None
    return Finding(
        rule="narrow_two_crops",
        severity="note",
        knobs=_knobs(trial, "crops.local_crops_number", "crops.global_1.scale", "crops.global_2.scale"),
        reason=f"Without local crops, global ones of at least {narrow:g} of the image differ little; the reference "
        f"widens them to {WIDE_SCALE} to 1.",
        source="main_dino.py --local_crops_number; facebookresearch/dino#122 (the settings of the paper's rows without "
        "multi-crop)",
        seen_here="Little of it seen: from 0.4 two crops have 96.7 and 97.9, four local ones besides 99.5 and 98.8; "
        "wider ones were not tried.",
    )


def overlapping_scales(trial: Trial) -> Finding | None:
    if not isinstance(trial.method, DINO | BYOL | MoCo | SwAV) or not trial.crops.local_crops_number:
        return None
    smallest = min(trial.crops.global_1.scale[0], trial.crops.global_2.scale[0])
    if trial.crops.local.scale[1] <= smallest:
        return None
    return Finding(
        rule="overlapping_scales",
        severity="note",
        knobs=_knobs(trial, "crops.local.scale", "crops.global_1.scale", "crops.global_2.scale"),
        reason=f"Local crops of up to {trial.crops.local.scale[1]:g} of the image may show more of it than global "
        f"ones, from {smallest:g}: in the paper one range ends where the other begins.",
        source="Appendix E, crop scales",
        seen_here="Does not hold here: local crops of 0.15 to 0.9 have 99.3 and 97.4.",
    )


def byol_local_crops(trial: Trial) -> Finding | None:
    if not isinstance(trial.method, BYOL) or not trial.crops.local_crops_number:
        return None
    return Finding(
        rule="byol_local_crops",
        severity="note",
        knobs=_knobs(trial, "method.kind", "crops.local_crops_number"),
        reason="Local crops cost BYOL what they bring DINO: k-NN 59.8 with them and 66.6 % without.",
        source="Appendix E",
        seen_here="Holds in one seed of two: 80.8 and 83.4 with them, 96.5 and 75.3 without.",
    )


def gray_crops(trial: Trial) -> Finding | None:
    if not isinstance(trial.data, Shapes) or trial.data.class_factor != "color":
        return None
    gray = [view for view in _views(trial) if getattr(trial.crops, view).grayscale_probability > 0]
    if not gray:
        return None
    return Finding(
        rule="gray_crops",
        severity="note",
        knobs=_knobs(trial, "data.class_factor", *(f"crops.{view}.grayscale_probability" for view in gray)),
        reason="Crops in gray unlearn colour, which is the class here.",
        source="experiments/README.md",
        seen_here="Found here: with a fifth of the crops in gray 33.6 and 35.4, without 97.4 and 93.3.",
    )


def strong_blur(trial: Trial) -> Finding | None:
    strong = []
    for name in _views(trial):
        view: View = getattr(trial.crops, name)
        size = "local_crops_size" if name == "local" else "global_crops_size"
        if view.blur_probability > 0 and view.blur_sigma[1] > BLUR * getattr(trial.crops, size) + 1e-9:
            strong += [f"crops.{name}.blur_sigma", f"crops.{size}"]
    if not strong:
        return None
    return Finding(
        rule="strong_blur",
        severity="note",
        knobs=_knobs(trial, *strong),
        reason="The blur is in pixels and made for crops of 96 and 224: of smaller ones it takes more than the "
        f"reference does, whose sigma is at most {BLUR:.3f} of a crop's side.",
        source="main_dino.py, DataAugmentationDINO",
        seen_here="Seen: 0.1 to 2 pixels take patterns from crops of 32 pixels (k-NN of backgrounds 16.2 and 23.8, "
        "without blur 24.6 and 31.7).",
    )


# ---------------------------------------------------------------------------------------------------- optimiser


def high_lr(trial: Trial) -> Finding | None:
    peak = _peak_lr(trial)
    if peak is None or peak <= HIGH_LR:
        return None
    return Finding(
        rule="high_lr",
        severity="warning",
        knobs=_knobs(trial, "optimizer.lr", "optimizer.lr_scaling", "batch_size"),
        reason=f"AdamW's learning rate rises to {peak:.2g} for this batch size; the published recipes have 0.001 to "
        "0.003.",
        source="README.md of facebookresearch/dino; its #43 (collapse on 48 GPUs, 0.006 by the defaults, and not on 8) "
        "and #273 (0.025)",
        seen_here="Holds: twice the 0.002 here has 98.2 and 63.6, four times 40.0 and 16.5.",
    )


def low_lr(trial: Trial) -> Finding | None:
    peak = _peak_lr(trial)
    if peak is None or peak >= LOW_LR:
        return None
    return Finding(
        rule="low_lr",
        severity="note",
        knobs=_knobs(trial, "optimizer.lr", "optimizer.lr_scaling", "batch_size"),
        reason=f"AdamW's learning rate rises only to {peak:.2g}, since lr is meant for 256 images and scaled to this "
        "batch size; the published recipes have 0.001 to 0.003.",
        source="main_dino.py --lr; facebookresearch/dino#110 (2 images: the loss does not fall in an epoch)",
        seen_here="Holds: 0.00006 has 45.3 and 45.4.",
    )


def long_warmup(trial: Trial) -> Finding | None:
    temps = _temperatures(trial)
    lengths = {"optimizer.warmup_epochs": trial.optimizer.warmup_epochs}
    if temps is not None and temps.sharpening:
        lengths["method.loss.warmup_teacher_temp_epochs"] = temps.warmup_teacher_temp_epochs
    long = [knob for knob, epochs in lengths.items() if epochs > trial.epochs / 2]
    if not long:
        return None
    return Finding(
        rule="long_warmup",
        severity="warning",
        knobs=_knobs(trial, *long, "epochs"),
        reason=f"A warm-up takes {max(lengths[knob] for knob in long):g} of {trial.epochs} epochs, more than half of "
        "the run; the published recipes warm up for a tenth.",
        source="README.md of facebookresearch/dino: 10 epochs of 100 to 800, temperature 30 of 300",
        seen_here="Half the run is best at 500 steps (learning rate: 250 steps have 76 and 97, 150 have 64 and 96); "
        "more was not tried.",
    )


def falling_weight_decay(trial: Trial) -> Finding | None:
    if trial.optimizer.weight_decay_end >= trial.optimizer.weight_decay:
        return None
    return Finding(
        rule="falling_weight_decay",
        severity="note",
        knobs=_knobs(trial, "optimizer.weight_decay", "optimizer.weight_decay_end"),
        reason="Weight decay falls; a small one at the start and a larger one at the end is what improves ViTs.",
        source="main_dino.py --weight_decay and --weight_decay_end (0.04 to 0.4)",
        seen_here="Does not hold here: 0.4 to 0.04 has 99.3 and 98.1.",
    )


def bf16_small_patch(trial: Trial) -> Finding | None:
    if trial.precision != "bf16" or not 1 < trial.backbone.patch_pixels < SMALL_PATCH:
        return None
    patch = "backbone.name" if trial.backbone.patch_size is None else "backbone.patch_size"
    return Finding(
        rule="bf16_small_patch",
        severity="note",
        knobs=_knobs(trial, "precision", patch),
        reason=f"With patches below {SMALL_PATCH} pixels (here {trial.backbone.patch_pixels}) the reference advises "
        "full precision, since half precision was unstable. That was fp16; bf16 has the range of f32.",
        source="main_dino.py --patch_size; facebookresearch/dino#104 (its author, of patches of 8)",
        seen_here="Does not hold once: 40 epochs of CIFAR-10 with patches of 4 in bf16 rose to 44.8.",
    )


def bf16_unclipped(trial: Trial) -> Finding | None:
    if trial.precision != "bf16" or trial.optimizer.clip_grad:
        return None
    return Finding(
        rule="bf16_unclipped",
        severity="note",
        knobs=_knobs(trial, "precision", "optimizer.clip_grad"),
        reason="In reduced precision with gradients that are not clipped nothing stops a bad step; the reference clips "
        "at 3, and advises 0.3 to 1 for larger ViTs.",
        source="main_dino.py --clip_grad; facebookresearch/dino#58 (NaN in half precision). Without clipping the paper "
        "has trained a ViT-S too (#122)",
        seen_here="Does not hold here, at a learning rate that is good in f32: 98.1 and 96.4.",
    )


def long_queue(trial: Trial, images: int) -> Finding | None:
    keys = trial.crops.global_crops_number * images
    if not isinstance(trial.method, MoCo) or trial.method.queue_size <= keys:
        return None
    return Finding(
        rule="long_queue",
        severity="note",
        knobs=_knobs(trial, "method.queue_size", "crops.global_crops_number"),
        reason=f"The queue holds {trial.method.queue_size:,} keys and an epoch makes {keys:,}: each image has keys of "
        "its own among its negatives.",
        source="MoCo (arXiv:1911.05722): 65,536 keys for 1.28 million images",
        seen_here="Does not hold here: 16,384 keys, twice an epoch of them, have 99.4 and 98.8, 1,024 98.2 and 94.6.",
    )


Rule: TypeAlias = Callable[[Trial], Finding | None]
RuleOnImages: TypeAlias = Callable[[Trial, int], Finding | None]

RULES: tuple[Rule, ...] = (
    hot_start,
    hot_teacher,
    cold_teacher,
    unused_warmup_temp,
    no_sharpening,
    student_not_softer,
    soft_student,
    no_centering,
    slow_center,
    no_momentum_teacher,
    no_momentum_evened,
    few_targets_evened,
    no_temperatures,
    nothing_against_constant,
    deep_plain_head,
    last_layer_held,
    free_lengths,
    predictor_on_dino,
    narrow_two_crops,
    overlapping_scales,
    byol_local_crops,
    gray_crops,
    strong_blur,
    high_lr,
    low_lr,
    long_warmup,
    falling_weight_decay,
    bf16_small_patch,
    bf16_unclipped,
)
"""What settings alone say."""
RULES_ON_IMAGES: tuple[RuleOnImages, ...] = (
    center_behind_run,
    teacher_behind_run,
    teacher_halts,
    small_batch_momentum,
    many_prototypes,
    long_queue,
)
"""What they say of so many images, and so of so many steps."""


# ---------------------------------------------------------------------------------------- what rules have in common

_TEACHER_TEMPS = (
    "method.loss.teacher_temp",
    "method.loss.warmup_teacher_temp",
    "method.loss.warmup_teacher_temp_epochs",
)


def _knobs(trial: Trial, *names: str) -> dict[str, Knob]:
    values = trial.flat()
    return {name: values[name] for name in names}


def _temperatures(trial: Trial) -> CrossEntropy | None:
    """The loss of a method that compares softmaxes of student and teacher."""
    loss = getattr(trial.method, "loss", None)
    return loss if isinstance(loss, CrossEntropy) else None


def _centering(trial: Trial) -> Centering | None:
    operation = getattr(trial.method, "operation", None)
    return operation if isinstance(operation, Centering) else None


def _momentum(trial: Trial) -> Momentum | None:
    """The teacher, if it is a moving average."""
    teacher = getattr(trial.method, "teacher", None)
    return teacher if isinstance(teacher, Momentum) else None


def _views(trial: Trial) -> tuple[str, ...]:
    """Kinds of crop that are made."""
    return ("global_1", "global_2", *(("local",) if trial.crops.local_crops_number else ()))


def _steps(trial: Trial, images: int) -> int:
    """Optimiser steps of the run; images that make no whole batch are left out of an epoch."""
    return trial.epochs * (images // trial.batch_size)


def lags(momentum: float, steps: int, *, part: float) -> bool:
    """Whether a running mean reaches back 1 / (1 - momentum) steps, more than this part of the run."""
    return (1 - momentum) * steps * part < 1 - 1e-9


def _steps_behind(momentum: float) -> str:
    return "no step" if momentum == 1 else f"{math.ceil(1 / (1 - momentum) - 1e-6):,} steps behind"


def _peak_lr(trial: Trial) -> float | None:
    """The highest learning rate of DINO with AdamW, scaled to the batch: where its warm-up ends."""
    if not isinstance(trial.method, DINO) or not isinstance(trial.optimizer, AdamW):
        return None
    return trial.optimizer.peak_lr(batch_size=trial.batch_size)
