"""Layers that look at a whole batch, where ranks have shares of it; in one process they are torch's and timm's."""

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino_lab.core.distributed import gather, own, workers

N = TypeVar("N", bound=nn.Module)


def spanning(network: N) -> N:
    """The network, whose batch normalisation and drop path from now on span the shares of all ranks; in place.

    Those of backbones, as timm made them, and of heads. Nothing that is learned or saved changes.
    """
    from timm.layers.drop import DropPath  # here, since planning a sweep need not wait for timm

    spans = {nn.BatchNorm1d: BatchNorm, nn.BatchNorm2d: BatchNorm, DropPath: SpanningDropPath}
    for module in network.modules():
        # The same layer with another forward pass.
        module.__class__ = spans.get(type(module), type(module))
    return network


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by mean and variance of all ranks' rows, of which each has equally many; with gradients.

    Torch's SyncBatchNorm is for GPUs alone.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Rows of features, or of channels of pixels."""

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        if workers() == 1 or not self.training:
            return super().forward(x)
        rows = x.float().movedim(1, -1)
        own_variance, own_mean = torch.var_mean(rows, dim=tuple(range(rows.ndim - 1)), correction=0)
        means, variances = gather(torch.stack([own_mean, own_variance])[None], dim=0).unbind(1)
        mean = means.mean(dim=0)
        # Of variances within and between ranks, and not of squares less a square, which would cancel.
        variance = (variances + (means - mean).square()).mean(dim=0)
        self._remember(mean.detach(), variance.detach(), number=workers() * rows[..., 0].numel())
        normalised = (rows - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        return normalised.movedim(-1, 1).to(x.dtype)

    def _remember(self, mean: Float[Tensor, "C"], variance: Float[Tensor, "C"], *, number: int) -> None:
        """Moves the running means that are used in evaluation, as torch does: with the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * number / (number - 1), self.momentum)


class SpanningDropPath(nn.Module):
    """timm's DropPath, with what is drawn for an image the same for any number of ranks."""

    drop_prob: float
    scale_by_keep: bool

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        if self.drop_prob == 0 or not self.training:
            return x
        kept = x.new_empty(workers() * len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        if self.scale_by_keep:
            kept.div_(1 - self.drop_prob)
        return x * own(kept)
