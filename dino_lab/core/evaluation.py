"""Evaluation of a trial's networks: which images are told apart, by whose features, and what is told of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.data.batches import Wholes
from dino_lab.core.data.images import ImageSet
from dino_lab.core.data.source import Split
from dino_lab.core.trial import SameData, Trial

_PIXELS_SIZE = 32
"""Side to which larger images are shrunk for k-NN of raw pixels, which would else need all of the memory."""


def opened(trial: Trial, data_dir: Path) -> "tuple[ImageSet, Evaluation]":
    """The images that a trial trains on, and those that it is judged by.

    Raises:
        ValueError: as `Source.build`.
    """
    if isinstance(trial.evals.data, SameData):
        sets = trial.data.build_all(data_dir)
        return sets["train"], Evaluation(trial, sets)
    return trial.data.build("train", data_dir), Evaluation(trial, trial.evals.data.build_all(data_dir))


class Evaluation:
    """k-NN on the images that a trial is judged by; nothing where nobody labelled them."""

    def __init__(self, trial: Trial, sets: Mapping[Split, ImageSet]) -> None:
        self.trial = trial
        self.size = trial.crops.global_crops_size
        self.images: dict[str, ImageSet] = {}
        """By their role: the neighbours, and those that are evaluated."""
        bank = sets["bank"]
        if bank.labels:
            if len(bank) > trial.evals.knn.bank_images:
                bank = bank.subset(np.arange(trial.evals.knn.bank_images))
            self.images = {"neighbours": bank, "evaluation": sets["test"]}
        self.factors = [factor for factor in bank.labels if factor != "class"]

    def trained(self, encoders: Mapping[str, nn.Module]) -> dict[str, float]:
        """k-NN of teacher and student; of every factor by the first encoder, a student if there is no teacher."""
        if not self.images:
            return {}
        top1 = self._knn(encoders, self.size)
        first, *others = encoders
        values = {records.KNN: top1(first, "class"), records.STUDENT_KNN: top1(others[0] if others else first, "class")}
        if others:
            values[records.TEACHER_MINUS_STUDENT] = values[records.KNN] - values[records.STUDENT_KNN]
        return values | {records.FACTOR_KNN + factor: top1(first, factor) for factor in self.factors}

    def untrained(self, encoders: Mapping[str, nn.Module]) -> dict[str, float]:
        """k-NN of the network that teacher and student still are, and of raw pixels beside it."""
        if not self.images:
            return {}
        first, network = next(iter(encoders.items()))
        values = self.trained({first: network})
        top1 = self._knn({"pixels": nn.Flatten()}, min(self.size, _PIXELS_SIZE))
        values[records.PIXELS_KNN] = top1("pixels", "class")
        return values | {records.FACTOR_PIXELS_KNN + factor: top1("pixels", factor) for factor in self.factors}

    def _knn(self, encoders: Mapping[str, nn.Module], size: int) -> Callable[[str, str], float]:
        """Encoder and factor -> k-NN. Every image is read once for all of them."""
        bank, queries = self.images.values()
        bank_features, query_features = (self._features(encoders, images, size) for images in (bank, queries))
        return lambda encoder, factor: self.trial.evals.knn.top1(
            bank_features[encoder], bank.labels[factor], query_features[encoder], queries.labels[factor]
        )

    @torch.inference_mode()
    def _features(
        self, encoders: Mapping[str, nn.Module], images: ImageSet, size: int
    ) -> dict[str, Float[Tensor, "N D"]]:
        """Features of whole images, on the host; drop path and batch normalisation as in use, not as in training."""
        modes = [(module, module.training) for network in encoders.values() for module in network.modules()]
        for network in encoders.values():
            network.eval()
        features: dict[str, list[Tensor]] = {name: [] for name in encoders}
        for part in Wholes(images, size).load(loader_workers=self.trial.runtime.loader_workers):
            crops = part.to(self.trial.runtime.device)
            for name, network in encoders.items():
                features[name].append(network(crops).cpu())
        for module, training in modes:
            module.training = training
        return {name: torch.cat(parts) for name, parts in features.items()}
