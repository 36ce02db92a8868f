"""Trial: every Settings put together, and the rules that hold across sections."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from dino_lab.core.data.crops import Crops
from dino_lab.core.data.sources import AnyData, DataSettings, Shapes
from dino_lab.core.diagnostics.collapse import Collapse
from dino_lab.core.evals.attention import Attention
from dino_lab.core.evals.knn import KNN
from dino_lab.core.evals.linear import LinearProbe
from dino_lab.core.evals.low_shot import LowShot
from dino_lab.core.methods import MethodSettings
from dino_lab.core.methods.dino import DINO
from dino_lab.core.methods.swav import SwAV
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.optimizers import AdamW, OptimizerSettings
from dino_lab.core.settings import Settings

EvalName: TypeAlias = Literal["knn", "factors", "linear", "low_shot", "retrieval", "attention", "pictures"]


class SameData(Settings):
    """The data set that is trained on."""

    kind: Literal["same"] = "same"
    """Which data set."""


class Evals(Settings):
    """What is evaluated, of teacher and student alike, and when."""

    data: Annotated[SameData | AnyData, Field(discriminator="kind")] = SameData()
    """Whose images are told apart: the same as in training, or those of another data set."""
    every_epochs: int = Field(default=10, ge=1)
    """Epochs between evaluations."""
    during: tuple[EvalName, ...] = ("knn", "factors")
    """What is evaluated every so many epochs."""
    at_end: tuple[EvalName, ...] = ("knn", "factors")
    """What is evaluated at the start, of the untrained network, and at the end, where it is the result."""
    bank_images: int = Field(default=100_000, ge=1)
    """Labelled training images that are neighbours, or that classifiers are trained on, at most; the first ones."""
    knn: KNN = KNN()
    """Weighted k-NN of the class, and of every factor that images have."""
    linear: LinearProbe = LinearProbe()
    """A linear classifier on frozen features."""
    low_shot: LowShot = LowShot()
    """The same with few labels."""
    attention: Attention = Attention()
    """Attention of the last block beside the masks of objects."""


class Runtime(Settings):
    """Where and how a trial runs; should not affect results and is left out of its identity."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the networks are."""
    workers: int = Field(default=1, ge=1)
    """Processes that train one trial, each on its share of every batch; cpus, gpus, memory and loaders are of each."""
    cpus: int = Field(default=1, ge=1)
    """Processors of a worker; it computes with as many threads."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of a worker; a fraction shares one, which only a single worker can."""
    memory_gib: float = Field(default=0.0, ge=0)
    """Memory that a worker is booked with, GiB; 0 books none."""
    loader_workers: int = Field(default=0, ge=0)
    """Processes that make crops ahead for a worker; 0 makes them in its own, of images kept at one size on its
    device."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Wall time that an attempt may take; then it counts as failed, also if it hangs. None: no limit."""
    log_period_steps: int = Field(default=50, ge=1)
    """Steps between records."""
    checkpoint_period_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    data_dir: str | None = None
    """Where data sets are kept; None keeps them in the trial's own folder."""


class Trial(Settings):
    """One student and its teacher: everything that their training depends on."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"runtime"})

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of weights, order, crops and drop path; arms with the same seed see the same crops."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=64, ge=1)
    """B, images of a step."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Equal parts in which a step's images are worked through. The step is that of the whole batch, but for what looks
    at whole batches: batch normalisation, Sinkhorn, softmax over the batch, InfoNCE, queues, and draws of drop path
    and masks."""
    precision: Literal["f32", "bf16"] = "f32"
    """Of matrix products in forward and backward passes; weights, loss and the average of the teacher stay f32."""
    data: DataSettings = Shapes()
    crops: Crops = Crops()
    backbone: Backbone = Backbone()
    method: MethodSettings = DINO()
    optimizer: OptimizerSettings = AdamW()
    evals: Evals = Evals()
    collapse: Collapse = Collapse()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        wrong = []
        images = self.data.known_train_images
        if images is not None and self.batch_size > images:
            wrong.append(f"batch_size = {self.batch_size}: exceeds the {images} images of data")
        if self.batch_size % self.accumulation_steps:
            wrong.append(f"accumulation_steps = {self.accumulation_steps}: must divide batch_size = {self.batch_size}")
        elif self.batch_size % (self.accumulation_steps * self.runtime.workers):
            wrong.append(
                f"runtime.workers = {self.runtime.workers}: times accumulation_steps = {self.accumulation_steps} must "
                f"divide batch_size = {self.batch_size}"
            )
        for knob, value in self.flat().items():
            warms_up = knob.endswith((".warmup_epochs", ".warmup_teacher_temp_epochs"))
            if warms_up and isinstance(value, int | float) and value > self.epochs:
                wrong.append(f"{knob} = {value}: exceeds epochs = {self.epochs}")
        if isinstance(self.method, SwAV) and self.method.queue_size and self.method.queue_start_epochs >= self.epochs:
            wrong.append(
                f"method.queue_start_epochs = {self.method.queue_start_epochs}: is not before the end, "
                f"epochs = {self.epochs}, so that method.queue_size = {self.method.queue_size} would do nothing"
            )
        patch = self.backbone.patch_pixels
        for name in ("global_crops_size", "local_crops_size"):
            size = getattr(self.crops, name)
            unused = name == "local_crops_size" and self.crops.local_crops_number == 0
            if size % patch and not unused:
                wrong.append(f"crops.{name} = {size}: must be a multiple of the backbone's patch size, {patch}")
        if self.crops.backend == "batched" and self.data.image_size is None:
            wrong.append("crops.backend = 'batched': needs images that are kept at one size, by data.image_size")
        if self._judges_what_it_trains_on():
            wrong.append(
                "evals.data.evaluation_split = 'held_out': holds out images of the data that is trained on, of which "
                f"data.evaluation_split = {self.data.evaluation_split!r} trains on all"
            )
        if self.method.kind in ("mae", "masked") and not self.backbone.has_tokens:
            wrong.append(
                f"backbone.name = {self.backbone.name!r}: has no patches to hide, which method.kind = "
                f"{self.method.kind!r} needs; allowed are plain vision transformers"
            )
        wrong += self._evaluated_in_vain()
        if self.runtime.device == "cpu" and self.runtime.gpus:
            wrong.append(f"runtime.gpus = {self.runtime.gpus}: runtime.device is 'cpu'; set it to 'cuda'")
        if self.runtime.workers > 1 and self.runtime.gpus % 1:
            wrong.append(
                f"runtime.gpus = {self.runtime.gpus}: cannot share a GPU where runtime.workers = "
                f"{self.runtime.workers} exchange gradients; allowed are whole numbers"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def _evaluated_in_vain(self) -> Iterator[str]:
        """What is to be evaluated and cannot be."""
        for knob in ("during", "at_end"):
            asked = getattr(self.evals, knob)
            if "attention" in asked and not self.judged.has_masks:
                yield f"evals.{knob} has 'attention': no objects are marked in images of kind {self.judged.kind!r}"
            # What masked and mae are judged by is the mean of the patches, to which no token attends.
            attends = self.backbone.has_tokens and self.method.kind not in ("mae", "masked")
            for name in ("attention", "pictures"):
                if name in asked and not attends:
                    yield (
                        f"evals.{knob} has {name!r}: needs a CLS token, which backbone.name = {self.backbone.name!r} "
                        f"and method.kind = {self.method.kind!r} do not judge by"
                    )

    def _judges_what_it_trains_on(self) -> bool:
        """Whether images are held out by the judging section alone, of a data set that training takes whole."""
        chosen = {"fraction", "classes", "evaluation_split", "class_factor", "image_size", "bad_images", "digest"}
        trained, judged = (section.model_dump(exclude=chosen) for section in (self.data, self.judged))
        held_out = self.judged.evaluation_split == "held_out" and self.data.evaluation_split != "held_out"
        return held_out and trained == judged

    @property
    def judged(self) -> AnyData:
        """The data set whose images are told apart."""
        return self.data if isinstance(self.evals.data, SameData) else self.evals.data
