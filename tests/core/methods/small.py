"""The small networks and crops that methods are tried on, their steps, and the sums that their losses are made of."""

import math
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dino_lab.core.methods.method import Batch, Method, Outcome, Surroundings, joined
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.schedules import Now

B, SIZE, STEPS, CLASSES = 4, 16, 6, 5
BACKBONE = Backbone(name="vit_tiny_patch16_224", patch_size=8, embed_dim=24, depth=2, num_heads=3, drop_path_rate=0.0)
SURROUNDINGS = Surroundings(
    classes_number=CLASSES, image_size=SIZE, global_crops_number=2, trials_dir=Path("no trials")
)

# Methods that hide patches have more of them: N in each global crop.
SIDE, PATCH = 4, 4
N = SIDE * SIDE
FINE = BACKBONE.but({"patch_size": PATCH})

# Those of batch normalisation, which any forward pass in training moves.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

AnyMethod = TypeVar("AnyMethod", bound=Method)
Vectors = TypeVar("Vectors", np.ndarray, Tensor)


def batch(
    seed: int = 0,
    *,
    global_crops: int = 2,
    local_crops: int = 2,
    images: int = B,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(global_crops, images, 3, SIZE, SIZE, generator=generator, dtype=dtype),
        torch.randn(local_crops, images, 3, 8, 8, generator=generator, dtype=dtype),
        torch.randint(CLASSES, (images,), generator=generator),
    )


def now(step: int = 0, *, steps_per_epoch: int = 2, measured: bool = True) -> Now:
    return Now(step, steps=STEPS, steps_per_epoch=steps_per_epoch, measured=measured)


def over(hidden: Tensor) -> Tensor:
    """The pixels of hidden patches."""
    return hidden.view(-1, SIDE, SIDE).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]


# ------------------------------------------------------------------------------------------------- what is state


def state(module: nn.Module, *, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A copy of what a checkpoint would hold, but for names with one of these in them."""
    return {
        name: value.clone() for name, value in module.state_dict().items() if not any(part in name for part in without)
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(method: AnyMethod) -> AnyMethod:
    """The student away from its teacher, as after some steps."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return method


# ----------------------------------------------------------------------------------------------------- its steps


def take_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    step: int,
    crops: Batch | None = None,
    *,
    parts: int = 1,
    measured: bool = True,
) -> Outcome:
    """As the trainer takes it, on these crops or on the step's own."""
    if crops is None:
        crops = batch(step, dtype=next(method.student.parameters()).dtype)
    moment = now(step, measured=measured)
    torch.manual_seed(step)
    optimizer.zero_grad()
    outcomes = []
    for part in crops.split(parts):
        outcomes.append(method.loss(part, moment))
        (outcomes[-1].loss / parts).backward()
    for parameter in method.held(moment):
        parameter.grad = None
    optimizer.step()
    method.after_step(moment)
    return joined(outcomes)


def take_steps(
    method: Method, optimizer: torch.optim.Optimizer, steps: range, *, parts: int = 1, measured: bool = True
) -> None:
    for step in steps:
        take_step(method, optimizer, step, parts=parts, measured=measured)


def shapes_seen(method: Method) -> dict[str, list[tuple[int, ...]]]:
    """By encoder the shapes of the crops that it is given from now on."""
    shapes: dict[str, list[tuple[int, ...]]] = {role: [] for role in method.encoders()}
    for role, encoder in method.encoders().items():
        encoder.register_forward_pre_hook(lambda _, inputs, role=role: shapes[role].append(tuple(inputs[0].shape)))
    return shapes


# ---------------------------------------------------------------------------------------------------- plain sums


def pairs(globals_number: int, crops_number: int) -> list[tuple[int, int, int]]:
    """(g, v, i): each global crop g of the teacher with every other crop v of the student, of each image i."""
    return [(g, v, i) for g in range(globals_number) for v in range(crops_number) if v != g for i in range(B)]


def unit(vectors: Vectors) -> Vectors:
    """These directions, with length 1."""
    return vectors / (vectors**2).sum(-1)[..., None] ** 0.5


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def cross_entropy_and_parts(q: np.ndarray, p: np.ndarray) -> tuple[float, float, float]:
    """Cross-entropy of two distributions, the entropy of q, and the KL divergence between them."""
    both = list(zip(q, p, strict=True))
    return (
        -sum(q_k * math.log(p_k) for q_k, p_k in both),
        -sum(q_k * math.log(q_k) for q_k in q),
        sum(q_k * math.log(q_k / p_k) for q_k, p_k in both),
    )


def plain_mlp(mlp: nn.Module, x: Tensor, activation: str = "relu") -> Tensor:
    """Linear layers with, after each but the last, batch normalisation if there is any, and the activation."""
    linears = [layer for layer in mlp.children() if isinstance(layer, nn.Linear)]
    norms = [layer for layer in mlp.children() if isinstance(layer, nn.BatchNorm1d)]
    for number, linear in enumerate(linears):
        x = x @ linear.weight.T.to(x.dtype) + linear.bias
        if linear is linears[-1]:
            break
        if norms:
            variance = ((x - x.mean(dim=0)) ** 2).mean(dim=0)
            x = (x - x.mean(dim=0)) / torch.sqrt(variance + 1e-5) * norms[number].weight + norms[number].bias
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2 if activation == "gelu" else torch.where(x > 0, x, 0)
    return x
