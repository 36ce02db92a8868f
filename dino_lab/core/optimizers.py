"""The optimiser of the student: parameter groups, clipping, and the values that are scheduled."""

import math
from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from dino_lab.core.schedules import Now, cosine
from dino_lab.core.settings import Settings


class _Scheduled(Settings):
    """What every optimiser has: schedules of learning rate and weight decay, and clipping."""

    lr: float = Field(default=0.0005, gt=0)
    """Learning rate at the end of the warm-up for a batch of 256; how it follows the batch size says `lr_scaling`."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """Multiplies lr and not min_lr by batch_size / 256, by its square root, or by nothing."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the end of training; not scaled."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    """Epochs over which the learning rate rises from 0; may be a fraction."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at the start; biases and one-dimensional parameters have none."""
    weight_decay_end: float = Field(default=0.4, ge=0)
    """Weight decay at the end of its cosine; a larger decay late improves ViTs."""
    clip_grad: float = Field(default=3.0, ge=0)
    """Largest l2 norm of a gradient; 0 does not clip."""
    clip_over: Literal["each", "all"] = "each"
    """Whether that is the norm of each parameter's gradient, as in the reference, or of all together."""

    def peak_lr(self, *, batch_size: int) -> float:
        """The learning rate at the end of the warm-up, scaled to the batch."""
        ratio = batch_size / 256
        return self.lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.lr_scaling]

    def lr_at(self, now: Now, *, batch_size: int) -> float:
        return cosine(
            now.step,
            steps=now.steps,
            start=self.peak_lr(batch_size=batch_size),
            end=self.min_lr,
            warmup_steps=int(self.warmup_epochs * now.steps_per_epoch),
        )

    def weight_decay_at(self, now: Now) -> float:
        return cosine(now.step, steps=now.steps, start=self.weight_decay, end=self.weight_decay_end)

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clips gradients in place; returns the l2 norm of all of them before."""
        clip = clip_each if self.clip_over == "each" else clip_all
        return clip(parameters, clip_grad=self.clip_grad)


class AdamW(_Scheduled):
    """AdamW with torch's defaults."""

    kind: Literal["adamw"] = "adamw"
    """Which optimiser."""

    def build(self, student: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(student), lr=0.0, weight_decay=0.0, fused=True)


class SGD(_Scheduled):
    """Stochastic gradient descent with momentum; its weight decay is part of the gradient."""

    kind: Literal["sgd"] = "sgd"
    """Which optimiser."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Weight of the gradients of the steps before."""

    def build(self, student: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(student), lr=0.0, momentum=self.momentum)


class LARS(_Scheduled):
    """SGD whose step follows the length of each weight; biases and one-dimensional parameters are spared that.

    timm's: as in the article a step is divided by |gradient| + weight_decay |weight|, where the reference has
    |gradient + weight_decay weight|; as in the reference the learning rate multiplies the velocity, where the article
    has it inside.

    Source: LARS (arXiv:1708.03888), Algorithm 1.
    """

    kind: Literal["lars"] = "lars"
    """Which optimiser."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Weight of the gradients of the steps before."""
    trust_coefficient: float = Field(default=0.001, gt=0)
    """Length of a step as a part of the weight's length, for a learning rate of 1."""

    def build(self, student: nn.Module) -> torch.optim.Optimizer:
        from timm.optim.lars import Lars  # here, since planning a sweep need not wait for timm

        decayed, spared = parameter_groups(student)
        # Without weight decay, timm adapts a group only if told to.
        groups = [decayed | {"always_adapt": True}, spared | {"always_adapt": False}]
        return Lars(groups, lr=0.0, momentum=self.momentum, trust_coeff=self.trust_coefficient)


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


def clip_all(parameters: Iterable[nn.Parameter], *, clip_grad: float) -> Tensor:
    """Scales all gradients together, in place, to an l2 norm of at most `clip_grad`; returns their norm before.

    `clip_grad` 0 only measures.
    """
    return nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)


OptimizerSettings: TypeAlias = Annotated[AdamW | SGD | LARS, Field(discriminator="kind")]
