"""What to try against a collapse, by its kind and by the settings that it came with; each advice with its source.

Sections, tables, figures and appendices are of DINO (arXiv:2104.14294), help texts of its main_dino.py. k-NN accuracies
of experiments/README.md are of two seeds, where the untrained network has 36 % and DINO 99.5 and 98.8 %.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from dino_lab.core.diagnostics.collapse import Kind
from dino_lab.core.settings import Knob
from dino_lab.core.trial import Trial
from dino_lab.lint import (
    CENTER_LAG,
    DEEP_HEAD,
    FAST_TEACHER,
    HIGH_LR,
    HOT,
    HOT_START,
    LOW_LR,
    SLOW_CENTER,
    TEACHER_LAG,
    lags,
)

PAPER_TEMP = 0.04
"""Teacher temperature of the paper."""
FEW_DIMENSIONS = 8
"""Width of a layer below which outputs have not the room for more; the reference has 256 and more."""
LARGE_WEIGHT_DECAY = 1.0
"""Weight decay that outweighs the gradients; the reference ends at 0.4."""


@dataclass(frozen=True)
class Advice:
    """Something to try."""

    when: str
    """The setting that it is for."""
    what: str
    why: str
    source: str
    changes: dict[str, Knob] = field(default_factory=dict)
    """As for `--set`; empty where a number has to be found."""


def advice_against(kinds: Iterable[Kind], trial: Trial | None = None, steps: int | None = None) -> list[Advice]:
    """What to try against these kinds: with the settings of a trial, what is for them; without, all of it.

    Args:
        steps: Of the whole run; None where nobody knows.
    """
    facts = None if trial is None else _facts(trial, steps)
    found = []
    for kind in kinds:
        of_kind = [remedy for remedy in REMEDIES if kind in remedy.kinds and (facts is None or remedy.applies(facts))]
        known = [remedy for remedy in of_kind if not remedy.is_last]
        last = [remedy for remedy in of_kind if remedy.is_last]
        found += known + last if facts is None else known or last
    return list({remedy.advice.what: remedy.advice for remedy in found}.values())


@dataclass(frozen=True)
class Facts:
    """What advice depends on."""

    knobs: Mapping[str, Knob]
    steps: int | None
    """Of the whole run."""
    peak_lr: float
    """Where the warm-up of the learning rate ends, scaled to the batch."""

    def number(self, knob: str, default: float) -> float:
        """A knob's value; the default where the method has not this knob."""
        value = self.knobs.get(knob)
        return default if value is None else float(value)  # type: ignore[arg-type]

    @property
    def sharpens(self) -> bool:
        return self.knobs.get("method.loss.sharpening") is True

    @property
    def temp(self) -> float:
        return self.number("method.loss.teacher_temp", PAPER_TEMP)

    @property
    def first_temp(self) -> float:
        """Teacher temperature of the first epoch."""
        warms_up = self.number("method.loss.warmup_teacher_temp_epochs", 0) > 0
        return self.number("method.loss.warmup_teacher_temp", PAPER_TEMP) if warms_up else self.temp

    def lags(self, momentum: float, part: float) -> bool:
        """Whether a running mean reaches back over more than this part of the run."""
        return self.steps is not None and lags(momentum, self.steps, part=part)


@dataclass(frozen=True)
class Remedy:
    """Advice, the kinds of collapse that it is for, and the settings."""

    kinds: tuple[Kind, ...]
    applies: Callable[[Facts], bool]
    advice: Advice
    is_last: bool = False
    """Tried where nothing else is known."""


def _facts(trial: Trial, steps: int | None) -> Facts:
    return Facts(trial.flat(), steps, trial.optimizer.peak_lr(batch_size=trial.batch_size))


def _without_negatives(facts: Facts) -> bool:
    """Neither predictor, centre, temperatures nor negatives."""
    bare = (
        facts.knobs.get("method.loss.kind") in ("mse", "cosine") and facts.knobs.get("method.operation.kind") == "none"
    )
    return facts.knobs.get("method.predictor.kind") == "none" and (bare or facts.knobs["method.kind"] == "byol")


_BOOK = "experiments/README.md"
REMEDIES = (
    # ---------------------------------------------------------------- targets that go flat
    Remedy(
        ("uniform", "not_started"),
        lambda facts: facts.knobs.get("method.loss.sharpening") is False,
        Advice(
            "without sharpening",
            "turn sharpening on",
            "centring alone draws all targets to the uniform one; sharpening is what stands against it",
            "Section 5.3 and Figure 7",
            {"method.loss.sharpening": True},
        ),
    ),
    Remedy(
        ("uniform", "not_started"),
        lambda facts: facts.sharpens and facts.first_temp > HOT_START,
        Advice(
            "with a teacher that starts hotter than 0.06",
            "start the teacher at 0.04; warm it up to 0.07 at most",
            f"in the paper 0.08 has a k-NN of 0.1 %, 0.04 one of 69.6, 0.04 warmed up to 0.07 one of 69.7; {_BOOK}: "
            "41.2 and "
            "38.4, 99.5 and 98.8, 97.0 and 96.6",
            f"Appendix D; facebookresearch/dino#61 (0.3 without a warm-up); {_BOOK}, teacher_temperature",
            {"method.loss.teacher_temp": 0.04, "method.loss.warmup_teacher_temp": 0.04},
        ),
    ),
    Remedy(
        ("uniform",),
        lambda facts: facts.sharpens and facts.temp > HOT and facts.first_temp <= HOT_START,
        Advice(
            "with a teacher that is warmed up to more than 0.07",
            "end its warm-up at 0.07 or below",
            "above it most runs are unstable",
            "main_dino.py --teacher_temp",
            {"method.loss.teacher_temp": 0.07},
        ),
    ),
    Remedy(
        ("uniform",),
        lambda facts: (
            facts.sharpens and facts.number("method.loss.student_temp", 0.1) <= max(facts.temp, facts.first_temp)
        ),
        Advice(
            "with a student's temperature that is not above the teacher's",
            "give the student 0.1, and the teacher 0.04 to 0.07",
            f"nothing is sharpened otherwise; {_BOOK}: 0.04 for both is uniform from step 140 and 120, 0.1 is not",
            f"Section 3.2 and Figure 7; {_BOOK}, student_temperature",
            {"method.loss.student_temp": 0.1},
        ),
    ),
    Remedy(
        ("uniform", "not_started"),
        lambda facts: (
            facts.knobs.get("method.head.kind") == "mlp" and facts.number("method.head.layers_number", 0) >= DEEP_HEAD
        ),
        Advice(
            "with a head of three layers or more that has no l2-normalised bottleneck",
            "give the head its bottleneck, or two layers",
            f"in the paper 3 and 4 layers collapse without it; {_BOOK}: 4 have 24.9 and 22.7 without, 99.5 and 98.8 "
            "with it",
            f"Appendix C; {_BOOK}, head_depth_l2",
            {"method.head.kind": "l2_bottleneck"},
        ),
    ),
    Remedy(
        ("uniform",),
        lambda facts: facts.knobs.get("method.operation.kind") in ("sinkhorn", "softmax_batch"),
        Advice(
            "with targets that are evened out over the batch (Sinkhorn-Knopp)",
            "even out more targets over fewer prototypes, or centre them",
            "a small batch leaves them all but uniform: a user saw it with 768 images and 262,144 prototypes, and "
            "another "
            "with 4,096; an author of DINOv2, whose batches have 2,048, expects nothing of 32",
            "facebookresearch/dinov3#199; facebookresearch/dinov2#298",
            {"method.operation.kind": "centering"},
        ),
    ),
    Remedy(
        ("uniform",),
        lambda facts: facts.sharpens and facts.temp > 0.02,
        Advice(
            "with all of that in order",
            "make the teacher colder, 0.02 or 0.03",
            "a lower temperature is more sharpening; it costs a little where there was no collapse (66.7 against 69.6 "
            "%)",
            "facebookresearch/dino#43 (its author); Appendix D",
        ),
        is_last=True,
    ),
    # ------------------------------------------------------- one target for all images
    Remedy(
        ("uniform", "one_prototype", "few_prototypes", "constant", "dimensional"),
        lambda facts: facts.knobs.get("method.teacher.kind") in ("student_copy", "previous_iteration"),
        Advice(
            "with a teacher that is the student, or the student of the step before",
            "make the teacher a moving average of the student, with weights of its own",
            f"in the paper both have a k-NN of 0.1 %, momentum 72.8; {_BOOK}: a copy has 17.8 and 19.0, momentum 99.5 "
            "and 98.8; "
            "softmax over the batch without momentum 44.9 and 22.4, with it 98.1 and 99.0",
            f"Table 7 and Figure 6; facebookresearch/dinov2#407 (both names were one network; copy.deepcopy); {_BOOK}, "
            "teacher_kind and centering_operation",
            {"method.teacher.kind": "momentum"},
        ),
    ),
    Remedy(
        ("uniform", "constant", "dimensional"),
        lambda facts: (
            facts.knobs.get("method.teacher.kind") == "momentum"
            and facts.number("method.teacher.momentum_teacher", 1) <= FAST_TEACHER
        ),
        Advice(
            "with a teacher that is the mean of ten steps or fewer",
            "slow it down: 0.98 in some hundred steps, 0.996 in the paper's 100,000",
            f"{_BOOK}: 0.9 has 16.6 and 16.7, 0.98 has 99.5 and 98.8",
            f"Section 3.2; {_BOOK}, momentum_teacher",
            {"method.teacher.momentum_teacher": 0.98, "method.teacher.momentum_teacher_end": 0.98},
        ),
    ),
    Remedy(
        ("one_prototype", "few_prototypes", "constant"),
        lambda facts: (
            facts.knobs.get("method.operation.kind") == "none"
            and facts.knobs.get("method.loss.kind") == "cross_entropy"
        ),
        Advice(
            "without centring",
            "turn centring on",
            "sharpening alone lets one prototype take over, and so does neither",
            "Section 5.3 and Figure 7; facebookresearch/dino#32 (its author, of neither)",
            {"method.operation.kind": "centering"},
        ),
    ),
    Remedy(
        ("one_prototype", "few_prototypes", "constant"),
        lambda facts: (
            (center := facts.number("method.operation.center_momentum", 0)) >= SLOW_CENTER
            or facts.lags(center, CENTER_LAG)
        ),
        Advice(
            "with a centre that follows too late, 0.999 or over a tenth of the run",
            "let the centre follow: 0.9",
            f"in the paper 0.999 has a k-NN of 0.1 %, 0.9 one of 69.7; {_BOOK}: of 500 steps 0.99 is one_prototype "
            "from 300 and "
            "280, 0.999 from 50 and 120, 0.9 has 99.5 and 98.8",
            f"Appendix D; {_BOOK}, center_momentum",
            {"method.operation.center_momentum": 0.9},
        ),
    ),
    Remedy(
        ("one_prototype", "few_prototypes", "constant"),
        lambda facts: facts.sharpens and facts.temp < PAPER_TEMP,
        Advice(
            "with a teacher colder than 0.04",
            "warm the teacher to 0.04",
            f"the colder, the nearer to arg-max; in the paper 0 has 43.9 %, 0.02 has 66.7, 0.04 has 69.6; {_BOOK}: "
            "69.5 and 22.3, "
            "70.4 and 27.2, 99.5 and 98.8",
            f"Appendix D; {_BOOK}, teacher_temperature",
            {"method.loss.teacher_temp": 0.04},
        ),
    ),
    Remedy(
        ("one_prototype", "few_prototypes"),
        lambda facts: facts.knobs.get("method.operation.kind") == "centering",
        Advice(
            "with all of that in order",
            "let the centre be that of the last batch",
            f"it costs nothing in the paper (69.1 against 69.7 %) and here (98.3 and 97.7; {_BOOK})",
            f"Appendix D; {_BOOK}, center_momentum",
            {"method.operation.center_momentum": 0.0},
        ),
        is_last=True,
    ),
    Remedy(
        ("constant", "dimensional"),
        _without_negatives,
        Advice(
            "with neither predictor, centre nor negatives",
            "give the student a predictor",
            f"in the paper such a row has 0.1 % linear; {_BOOK}: constant from step 1,130 and 1,220 of 2,000 without "
            "it, 96.5 "
            "and 75.3 with it",
            f"Table 14, row 8; {_BOOK}, dino_to_byol_moco",
            {"method.predictor.kind": "mlp"},
        ),
    ),
    # -------------------------------------------------------------------- few dimensions
    Remedy(
        ("dimensional", "uniform"),
        lambda facts: facts.number("method.head.bottleneck_dim", 256) <= FEW_DIMENSIONS,
        Advice(
            "with a bottleneck of a few dimensions",
            "widen the bottleneck",
            "logits are products with its vector, and have no more dimensions than it",
            "vision_transformer.py, DINOHead (256)",
            {"method.head.bottleneck_dim": 256},
        ),
    ),
    Remedy(
        ("dimensional", "uniform"),
        lambda facts: facts.number("method.head.hidden_dim", 2048) <= FEW_DIMENSIONS,
        Advice(
            "with hidden layers of a few units",
            "widen the head's hidden layers",
            "what passes through them has no more dimensions than they have",
            "vision_transformer.py, DINOHead (2048)",
            {"method.head.hidden_dim": 2048},
        ),
    ),
    Remedy(
        ("dimensional", "uniform"),
        lambda facts: facts.number("backbone.embed_dim", 384) <= FEW_DIMENSIONS,
        Advice(
            "with features of a few dimensions",
            "take a wider backbone",
            "features and all that follows have no more dimensions than backbone.embed_dim",
            "vision_transformer.py, vit_tiny (192)",
        ),
    ),
    Remedy(
        ("dimensional", "uniform", "constant"),
        lambda facts: facts.number("optimizer.weight_decay", 0) >= LARGE_WEIGHT_DECAY,
        Advice(
            "with a weight decay of 1 or more",
            "lower weight decay: 0.04 to 0.4",
            "it takes directions from the weights faster than the loss gives them",
            "main_dino.py --weight_decay and --weight_decay_end",
            {"optimizer.weight_decay": 0.04, "optimizer.weight_decay_end": 0.4},
        ),
    ),
    # ------------------------------------------------------------------- nothing moves
    Remedy(
        ("not_started",),
        lambda facts: facts.peak_lr < LOW_LR,
        Advice(
            "with a learning rate that does not reach 0.0001",
            "raise optimizer.lr until it reaches 0.001 to 0.003 for this batch",
            f"it is meant for 256 images and scaled to the batch; {_BOOK}: 0.032 for 16 images is 0.002, and learns",
            f"main_dino.py --lr; facebookresearch/dino#110 (batches of 2); {_BOOK}, a recipe for shapes_cpu",
        ),
    ),
    Remedy(
        ("not_started",),
        lambda facts: facts.number("method.teacher.momentum_teacher", 0) == 1,
        Advice(
            "with a teacher of momentum 1",
            "let the teacher follow the student",
            f"it keeps its first weights, and features are the teacher's; {_BOOK}: 36.4 and 35.6, those of the start",
            f"Section 3.1; {_BOOK}, momentum_teacher",
            {"method.teacher.momentum_teacher": 0.996},
        ),
    ),
    Remedy(
        ("not_started",),
        lambda facts: (
            (momentum := facts.number("method.teacher.momentum_teacher", 0)) < 1 and facts.lags(momentum, TEACHER_LAG)
        ),
        Advice(
            "with a teacher that is a mean over more than a quarter of the run",
            "let the teacher follow sooner, 0.98, or train for longer",
            f"{_BOOK}: in 500 steps 0.996 has 67.9 and 60.1, 0.98 has 99.5 and 98.8",
            f"{_BOOK}, momentum_teacher; facebookresearch/dino#246 (a user's loss fell only with 0.99)",
            {"method.teacher.momentum_teacher": 0.98, "method.teacher.momentum_teacher_end": 0.98},
        ),
    ),
    Remedy(
        ("not_started",),
        lambda facts: facts.number("optimizer.warmup_epochs", 0) > facts.number("epochs", 1) / 2,
        Advice(
            "with a warm-up of more than half the run",
            "warm the learning rate up for a tenth to a half of the run",
            f"until then it is lower than it is meant to be; {_BOOK}: half of 500 steps is best",
            f"README.md of facebookresearch/dino (10 epochs of 100); {_BOOK}, a recipe for shapes_cpu",
        ),
    ),
    Remedy(
        ("not_started",),
        lambda facts: True,
        Advice(
            "with all of that in order",
            "train for longer before judging",
            "the loss of a good run falls, rises and falls again in its first epochs (7.7, 9.6, 8.0)",
            "facebookresearch/dino#76",
        ),
        is_last=True,
    ),
    # --------------------------------------------------------------- steps that are too large
    Remedy(
        ("diverged",),
        lambda facts: facts.number("optimizer.clip_grad", 0) == 0,
        Advice(
            "without clipping",
            "clip gradients at 3, or 0.3 for larger networks",
            "nothing stops a bad step otherwise",
            "main_dino.py --clip_grad",
            {"optimizer.clip_grad": 3.0},
        ),
    ),
    Remedy(
        ("diverged",),
        lambda facts: facts.knobs["precision"] == "bf16",
        Advice(
            "in half precision",
            "train in full precision",
            f"a user's NaN after one step was gone with it, though that was fp16; {_BOOK}: a ResNet-18 in bf16 at a "
            "learning "
            "rate of 0.008 diverged at step 15",
            f"facebookresearch/dino#58 (its author); {_BOOK}, photographs",
            {"precision": "f32"},
        ),
    ),
    Remedy(
        ("diverged", "uniform", "constant", "one_prototype", "dimensional"),
        lambda facts: facts.peak_lr > HIGH_LR,
        Advice(
            "with a learning rate above 0.004",
            "lower optimizer.lr until it reaches 0.001 to 0.003 for this batch",
            "it is scaled to the batch: a user's 48 GPUs, by the defaults 0.006, collapsed, and 8 did not soon",
            "README.md of facebookresearch/dino; its #43; facebookresearch/dinov2#143 (NaN until its scaling was made "
            "slower)",
        ),
    ),
    Remedy(
        ("diverged", "constant", "dimensional"),
        lambda facts: True,
        Advice(
            "with all of that in order",
            "halve optimizer.lr, or lengthen its warm-up",
            "the first steps are those in which it happens",
            "facebookresearch/dinov2#143; facebookresearch/dino#43",
        ),
        is_last=True,
    ),
)
