"""Evaluation of a trial's networks: which images are told apart, by whose features, and what is told of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from dino_lab.core import checkpoint, distributed, records
from dino_lab.core.data.batches import Wholes
from dino_lab.core.data.crops import as_pixels
from dino_lab.core.data.images import ImageSet
from dino_lab.core.data.source import Split
from dino_lab.core.diagnostics import signals
from dino_lab.core.evals.attention import whole_masks
from dino_lab.core.evals.pictures import heads
from dino_lab.core.evals.retrieval import mean_average_precision
from dino_lab.core.networks.backbone import VisionTransformer
from dino_lab.core.trial import EvalName, SameData, Trial

PICTURES = "pictures"
"""The folder beside the checkpoint in which pictures over training are."""
_PIXELS_SIZE = 32
"""Side to which larger images are shrunk for k-NN of raw pixels, which would else need all of the memory."""
_PICTURED = 8
"""Images whose attention is drawn; the first ones."""


def opened(trial: Trial, data_dir: Path) -> "tuple[ImageSet, Evaluation]":
    """The images that a trial trains on, and those that it is judged by.

    Raises:
        ValueError: as `Source.build`.
    """
    if isinstance(trial.evals.data, SameData):
        sets = trial.data.build_all(data_dir)
        return sets["train"], Evaluation(trial, sets)
    return trial.data.build("train", data_dir), Evaluation(trial, trial.evals.data.build_all(data_dir))


@dataclass(frozen=True)
class Extracted:
    """What one network shows of the images of one split, on the host; of what is asked for, each made once."""

    features: Float[Tensor, "N D"]
    probed: Float[Tensor, "N F"] | None = None
    """Several blocks' CLS tokens, and perhaps the patches' mean, for the linear probe."""
    attention: Float[Tensor, "N H P"] | None = None


class Evaluation:
    """Whatever is asked for on the images that a trial is judged by; of classes nothing where nobody labelled them.

    Ranks share what costs most, which is to read images and to run networks on them. Then each has the features of all
    and makes the same scores, so that none waits for another for longer than an exchange may last.
    """

    def __init__(self, trial: Trial, sets: Mapping[Split, ImageSet]) -> None:
        self.trial = trial
        self.device = torch.device(trial.runtime.device)
        self.size = trial.crops.global_crops_size
        self.images: dict[str, ImageSet] = {}
        """By their role: those that are learned from, and those that are evaluated."""
        bank = sets["bank"]
        if "test" in sets:
            if len(bank) > trial.evals.bank_images:
                bank = bank.subset(np.arange(trial.evals.bank_images))
            self.images = {"neighbours": bank, "evaluation": sets["test"]}
        self.factors = [factor for factor in bank.labels if factor != "class"]

    def trained(self, encoders: Mapping[str, nn.Module], names: Iterable[EvalName]) -> dict[str, float]:
        """What is asked for, by logged name: of the first encoder, and of the student, which it is if there is no
        teacher; of factors by the first alone."""
        if not self.images:
            return {}
        asked = frozenset(names)
        bank, queries = (self._seen(encoders, images, self.size, asked) for images in self.images.values())
        first, *others = encoders
        values = self._scores(bank[first], queries[first], asked)
        of_student = self._scores(bank[others[0]], queries[others[0]], asked) if others else values
        if others and records.KNN in values:
            values[records.TEACHER_MINUS_STUDENT] = values[records.KNN] - of_student[records.KNN]
        values |= {records.STUDENT + name.removeprefix("eval/"): value for name, value in of_student.items()}
        return values | (self._factors(bank[first], queries[first], records.FACTOR_KNN) if "factors" in asked else {})

    def untrained(self, encoders: Mapping[str, nn.Module]) -> dict[str, float]:
        """What is asked for at the end, of the network that teacher and student still are, and k-NN of raw pixels."""
        if not self.images:
            return {}
        first, network = next(iter(encoders.items()))
        asked = frozenset(self.trial.evals.at_end)
        values = self.trained({first: network}, asked)
        size = min(self.size, _PIXELS_SIZE)
        bank, queries = (
            self._seen({"pixels": nn.Flatten()}, images, size, frozenset())["pixels"] for images in self.images.values()
        )
        if "knn" in asked and self.labelled:
            values[records.PIXELS_KNN] = self._knn(*self._features(bank, queries), "class")
        return values | (self._factors(bank, queries, records.FACTOR_PIXELS_KNN) if "factors" in asked else {})

    def picture(self, encoders: Mapping[str, nn.Module], step: int, workdir: Path) -> None:
        """Draws the attention of the first encoder's heads for the first images that are evaluated, if any are.

        Rank 0 does; the others help.
        """
        if not self.images:
            return
        images = self.images["evaluation"]
        shown = images.subset(np.arange(min(_PICTURED, len(images))))
        first, network = next(iter(encoders.items()))
        seen = self._seen({first: network}, shown, self.size, frozenset({"attention"}))[first]
        if distributed.rank():
            return
        assert seen.attention is not None
        crops = torch.cat(list(Wholes(shown, self.size).load(loader_workers=0)))
        (workdir / PICTURES).mkdir(exist_ok=True)
        with checkpoint.replacing(workdir / PICTURES / f"attention-{step}.png") as file:
            Image.fromarray(heads(as_pixels(crops), seen.attention).numpy()).save(file, "png")

    def _scores(self, bank: Extracted, queries: Extracted, asked: frozenset[EvalName]) -> dict[str, float]:
        """Of one network, by the names that those of the first encoder have; on the trial's device."""
        evals, values = self.trial.evals, {}
        if self.labelled:
            labels, truth = self._labels("class")
            learned, judged = self._features(bank, queries)
            if "knn" in asked:
                by_number = evals.knn.top1(learned, labels, judged, truth)
                values[records.KNN] = by_number.pop(evals.knn.neighbors_number)
                values |= {f"{records.KNN_OF}{number}": top1 for number, top1 in by_number.items()}
                values[records.EVALUATED_RANK] = signals.effective_rank(signals.spectrum(judged))
            if "linear" in asked:
                assert bank.probed is not None
                assert queries.probed is not None
                values[records.LINEAR], values[records.LINEAR_RATE] = evals.linear.top1(
                    bank.probed.to(self.device), labels, queries.probed.to(self.device), truth, seed=self.trial.seed
                )
            if "low_shot" in asked:
                # scikit-learn's, on the host.
                by_fraction = evals.low_shot.top1(bank.features, labels.cpu(), queries.features, truth.cpu())
                values |= {f"{records.LOW_SHOT}{100 * part:g}": top1 for part, top1 in by_fraction.items()}
            if "retrieval" in asked:
                values[records.RETRIEVAL] = mean_average_precision(judged, truth, learned, labels)
        if "attention" in asked:
            assert queries.attention is not None
            by_mass = evals.attention.jaccard(queries.attention, self.masks)
            values |= {f"{records.JACCARD}{100 * mass:g}": percent for mass, percent in by_mass.items()}
        return values

    def _factors(self, bank: Extracted, queries: Extracted, prefix: str) -> dict[str, float]:
        learned, judged = self._features(bank, queries)
        return {prefix + factor: self._knn(learned, judged, factor) for factor in self.factors}

    def _knn(self, learned: Float[Tensor, "N D"], judged: Float[Tensor, "M D"], factor: str) -> float:
        """With the number of neighbours that tables show, alone."""
        labels, truth = self._labels(factor)
        knn = self.trial.evals.knn.but({"further_neighbors_numbers": []})
        return knn.top1(learned, labels, judged, truth)[knn.neighbors_number]

    def _features(self, bank: Extracted, queries: Extracted) -> tuple[Float[Tensor, "N D"], Float[Tensor, "M D"]]:
        """On the trial's device, as the labels are."""
        return bank.features.to(self.device), queries.features.to(self.device)

    def _labels(self, factor: str) -> tuple[Tensor, ...]:
        """Of the images that are learned from, and of those that are evaluated."""
        return tuple(images.labels[factor].to(self.device) for images in self.images.values())

    @property
    def labelled(self) -> bool:
        return bool(self.images["neighbours"].labels)

    @property
    def masks(self) -> UInt8[Tensor, "N S S"]:
        """Of the objects in the images that are evaluated, as their networks see them."""
        images = self.images["evaluation"]
        assert images.masks is not None
        return whole_masks(images.masks[torch.from_numpy(images.places)], self.size)

    @torch.inference_mode()
    def _seen(
        self, encoders: Mapping[str, nn.Module], images: ImageSet, size: int, asked: frozenset[EvalName]
    ) -> dict[str, Extracted]:
        """What networks show of whole images, each read once for all of them, and by one rank.

        Drop path and batch normalisation are as in use, not as in training.
        """
        modes = [(module, module.training) for network in encoders.values() for module in network.modules()]
        for network in encoders.values():
            network.eval()
        parts: dict[str, list[Extracted]] = {name: [] for name in encoders}
        share = {"first": distributed.rank(), "every": distributed.workers()}
        for part in Wholes(images, size).load(loader_workers=self.trial.runtime.loader_workers, **share):
            crops = part.to(self.device)
            for name, network in encoders.items():
                parts[name].append(self._look(network, crops, asked))
        for module, training in modes:
            module.training = training
        return {name: _joined(distributed.in_turn(seen)) for name, seen in parts.items()}

    def _look(self, network: nn.Module, crops: Float[Tensor, "B 3 S S"], asked: frozenset[EvalName]) -> Extracted:
        probe = self.trial.evals.linear
        if not isinstance(network, VisionTransformer) or not asked & {"linear", "attention"}:
            features = network(crops).cpu()
            return Extracted(features, probed=features if "linear" in asked else None)
        look = network.look(crops, blocks_number=probe.blocks_number)
        blocks = list(look.blocks) + ([look.patches] if probe.patch_mean else [])
        return Extracted(
            look.blocks[-1].cpu(),
            probed=torch.cat(blocks, dim=-1).cpu() if "linear" in asked else None,
            attention=look.attention.cpu() if "attention" in asked else None,
        )


def _joined(parts: Iterable[Extracted]) -> Extracted:
    """What was seen of all images from that of some hundreds at a time."""

    def all_of(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    features = all_of("features")
    assert features is not None
    return Extracted(features, all_of("probed"), all_of("attention"))
