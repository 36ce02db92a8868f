"""Linear probe: a linear classifier on frozen features, for a whole grid of learning rates at once."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from dino_lab.core.evals.classes import first_of_each
from dino_lab.core.settings import Settings


class LinearProbe(Settings):
    """Softmax regression by stochastic gradient descent, as the reference trains it, on features that do not change.

    Departs from the reference in this: features are of whole images, extracted once, not of random crops of every
    epoch; and it reports the best epoch on the test images, where here the learning rate is chosen on a part of the
    training images, the classifier of the last epoch counts, and test labels are looked at once.

    Source: DINO (arXiv:2104.14294), Appendix F.2; dino, eval_linear.py.
    """

    blocks_number: int = Field(default=4, ge=1)
    """The last blocks whose CLS tokens are put side by side; the reference's of ViT-S, 1 of ViT-B."""
    patch_mean: bool = False
    """Puts the mean of the last block's patches beside them; the reference does of ViT-B."""
    learning_rates: tuple[float, ...] = Field(default=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), min_length=1)
    """Those that are tried, for a batch of 256 and scaled to others; the reference's 0.001, and more, since features
    that change less take larger steps."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=1024, ge=1)
    """Images of a step; the reference's, of 8 GPUs."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Part of the training images of each class on which the learning rate is chosen; then all are trained on."""

    def top1(
        self,
        train: Float[Tensor, "N F"],
        labels: Int64[Tensor, "N"],
        test: Float[Tensor, "M F"],
        test_labels: Int64[Tensor, "M"],
        *,
        seed: int,
    ) -> tuple[float, float]:
        """Percent of test images that are classified rightly, and the learning rate that was chosen.

        Of rates that are equally good on the held-out part the smallest is chosen.
        """
        held_out = _held_out(labels, self.validation_fraction, seed)
        rates = tuple(sorted(self.learning_rates))
        rate = rates[0]
        if len(rates) > 1 and held_out.any():
            kept = ~held_out
            weights = self._trained(train[kept], labels[kept], rates, classes=int(labels.max()) + 1, seed=seed)
            right = (_logits(weights, train[held_out]).argmax(dim=-1) == labels[held_out]).float().mean(dim=-1)
            rate = rates[int(right.argmax())]
        weights = self._trained(train, labels, (rate,), classes=int(labels.max()) + 1, seed=seed)
        right = (_logits(weights, test)[0].argmax(dim=-1) == test_labels).float().mean()
        return 100 * float(right), rate

    def _trained(
        self,
        features: Float[Tensor, "N F"],
        labels: Int64[Tensor, "N"],
        rates: tuple[float, ...],
        *,
        classes: int,
        seed: int,
    ) -> Float[Tensor, "R F+1 C"]:
        """Weights, the bias as their last row, for each learning rate; all see the same batches."""
        order = torch.Generator().manual_seed(seed)
        size = min(self.batch_size, len(features))
        steps_per_epoch = len(features) // size
        # The rates side by side, so that a batch is multiplied once for all of them.
        weights = features.new_zeros(features.shape[1] + 1, len(rates), classes)
        weights[:-1] = 0.01 * torch.randn(features.shape[1], classes, generator=order)[:, None]
        peaks = features.new_tensor(rates)[:, None] * size / 256
        optimizer = torch.optim.SGD([weights], lr=1.0, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        for _ in range(self.epochs):
            shuffled = torch.randperm(len(features), generator=order).to(features.device)
            for batch in shuffled[: steps_per_epoch * size].split(size):
                seen = features[batch]
                logits = (seen @ weights[:-1].flatten(1)).unflatten(1, weights.shape[1:]) + weights[-1]
                # The cross-entropy's gradient by its formula: of a probability that moves no weight nothing is left, as
                # denormal numbers make the product ten times slower.
                errors = F.threshold(logits.softmax(dim=-1), _NO_PROBABILITY, 0.0)
                errors[torch.arange(size, device=errors.device), :, labels[batch]] -= 1
                gradient = torch.cat([seen.T @ errors.flatten(1), errors.sum(dim=0).view(1, -1)]).view_as(weights)
                # Momentum is of the gradient times the rate, which is the same as long as the rate has one factor.
                weights.grad = gradient * peaks / size
                optimizer.step()
            schedule.step()
        return weights.transpose(0, 1)


_NO_PROBABILITY = 1e-26


def _logits(weights: Float[Tensor, "R F+1 C"], features: Float[Tensor, "B F"]) -> Float[Tensor, "R B C"]:
    return features @ weights[:, :-1] + weights[:, -1:]


def _held_out(labels: Int64[Tensor, "N"], fraction: float, seed: int) -> Tensor:
    """A part of each class, chosen at random; at least one image of each class stays."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    counts = torch.bincount(labels)
    numbers = torch.minimum((fraction * counts).round().long(), counts - 1).clamp(min=0)
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    held_out[shuffled[first_of_each(labels[shuffled], numbers)]] = True
    return held_out
