"""The optimiser of the student: parameter groups, clipping, and the values that are scheduled."""

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn

from dino_lab.core.schedules import cosine
from dino_lab.core.settings import Settings


class AdamW(Settings):
    """AdamW with the reference's schedules of learning rate and weight decay."""

    lr: float = Field(default=0.0005, gt=0)
    """Learning rate at the end of the warm-up for a batch of 256; it is scaled by batch_size / 256."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the end of training; not scaled."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    """Epochs over which the learning rate rises from 0; may be a fraction."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at the start; biases and one-dimensional parameters have none."""
    weight_decay_end: float = Field(default=0.4, ge=0)
    """Weight decay at the end of its cosine; a larger decay late improves ViTs."""
    clip_grad: float = Field(default=3.0, ge=0)
    """Largest l2 norm of each parameter's gradient; 0 does not clip."""
    freeze_last_layer_epochs: float = Field(default=1.0, ge=0)
    """Epochs during which the head's last layer is held; may be a fraction."""

    def build(self, student: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameter_groups(student), lr=0.0, weight_decay=0.0, fused=True)

    def lr_at(self, step: int, *, steps: int, steps_per_epoch: int, batch_size: int) -> float:
        return cosine(
            step,
            steps=steps,
            start=self.lr * batch_size / 256,
            end=self.min_lr,
            warmup_steps=int(self.warmup_epochs * steps_per_epoch),
        )

    def weight_decay_at(self, step: int, *, steps: int) -> float:
        return cosine(step, steps=steps, start=self.weight_decay, end=self.weight_decay_end)

    def holds_last_layer(self, step: int, *, steps_per_epoch: int) -> bool:
        return step < self.freeze_last_layer_epochs * steps_per_epoch


def parameter_groups(network: nn.Module) -> list[dict[str, object]]:
    """Two groups: the first with weight decay, the second, biases and one-dimensional parameters, without.

    Source: main_dino.py, utils.get_params_groups; timm's grouping would spare the position embedding too.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            group = spared if name.endswith(".bias") or parameter.ndim == 1 else decayed
            group.append(parameter)
    return [{"params": decayed}, {"params": spared}]


def set_schedule(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Writes this step's values; weight decay goes to the first group alone."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def clip_each(parameters: Iterable[nn.Parameter], *, clip_grad: float) -> Tensor:
    """Scales each gradient, in place, to an l2 norm of at most `clip_grad`; returns the norm of all before.

    Each parameter has its own norm, unlike torch's clip_grad_norm_. `clip_grad` 0 only measures.

    Source: main_dino.py, utils.clip_gradients.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)
    if clip_grad:
        factors = torch.stack(norms).add(1e-6).reciprocal().mul(clip_grad).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    norm: Tensor = torch.stack(norms).norm()
    return norm
