"""Heads: features to logits. The paper's, with its l2-normalised bottleneck; a plain MLP; and the predictor."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings

Activation: TypeAlias = Literal["gelu", "relu"]


class Head(nn.Module):
    """Features to logits in two parts, between which a predictor has its place."""

    projected_dim: int
    """Dimension between the parts."""

    def project(self, features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B P"]:
        raise NotImplementedError

    def logits(self, projected: Float[Tensor, "*B P"]) -> Float[Tensor, "*B K"]:
        raise NotImplementedError

    def forward(self, features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        return self.logits(self.project(features))

    def held(self, now: Now) -> Iterable[nn.Parameter]:
        """Parameters that do not move in this step."""
        return ()


# ---------------------------------------------------------------------------------------------- the paper's head


class BottleneckHeadSettings(Settings):
    """The paper's head: an MLP, an l2-normalised bottleneck, a weight-normed last layer."""

    kind: Literal["l2_bottleneck"] = "l2_bottleneck"
    """Which kind of head."""
    out_dim: int = Field(default=65536, ge=2, le=262144)
    """K, the number of prototypes: the dimension of the logits."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the hidden layers."""
    bottleneck_dim: int = Field(default=256, ge=1)
    """Dimension that is l2-normalised before the last layer."""
    layers_number: int = Field(default=3, ge=1)
    """Linear layers before the last one."""
    activation: Activation = "gelu"
    """Between the linear layers."""
    batch_norm: bool = False
    """Batch normalisation after each hidden linear layer."""
    small_start: bool = True
    """Starts the linear layers before the last with weights of std 0.02 and no biases; False as torch's layers."""
    norm_last_layer: bool = True
    """Holds the length of each prototype at 1; False lets it be learned."""
    freeze_last_layer_epochs: float = Field(default=1.0, ge=0)
    """Epochs during which the last layer is held; may be a fraction."""

    def build(self, embed_dim: int) -> "BottleneckHead":
        widths = [embed_dim, *[self.hidden_dim] * (self.layers_number - 1), self.bottleneck_dim]
        return BottleneckHead(
            mlp(widths, activation=self.activation, batch_norm=self.batch_norm, small_start=self.small_start),
            self.bottleneck_dim,
            out_dim=self.out_dim,
            norm_last_layer=self.norm_last_layer,
            freeze_last_layer_epochs=self.freeze_last_layer_epochs,
        )


class BottleneckHead(Head):
    """Features to logits, which are cosines with the prototypes while those have length 1.

    Source: DINO (arXiv:2104.14294), Appendix C; vision_transformer.py, DINOHead.
    """

    def __init__(
        self,
        layers: nn.Sequential,
        bottleneck_dim: int,
        *,
        out_dim: int,
        norm_last_layer: bool,
        freeze_last_layer_epochs: float,
    ) -> None:
        super().__init__()
        self.mlp = layers
        self.projected_dim = bottleneck_dim
        self.freeze_last_layer_epochs = freeze_last_layer_epochs
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, learn_length=not norm_last_layer)

    def project(self, features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B P"]:
        return self.mlp(features)  # type: ignore[no-any-return]

    def logits(self, projected: Float[Tensor, "*B P"]) -> Float[Tensor, "*B K"]:
        return self.last_layer(F.normalize(projected, dim=-1))  # type: ignore[no-any-return]

    def held(self, now: Now) -> Iterable[nn.Parameter]:
        return self.last_layer.parameters() if now.step < self.freeze_last_layer_epochs * now.steps_per_epoch else ()


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows have length `weight_g` and direction `weight_v`.

    Two plain parameters, with the names of the reference's checkpoints, so that an average over parameters
    averages both.
    """

    def __init__(self, in_dim: int, out_dim: int, *, learn_length: bool) -> None:
        super().__init__()
        linear = nn.Linear(in_dim, out_dim, bias=False)
        self.weight_v = nn.Parameter(linear.weight.data)
        self.weight_g = nn.Parameter(linear.weight.data.new_ones(out_dim, 1), requires_grad=learn_length)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


# ---------------------------------------------------------------------------------------------------- plain MLPs


class MLPHeadSettings(Settings):
    """An MLP without a bottleneck: what BYOL and MoCo project with, and the paper's head without l2 normalisation."""

    kind: Literal["mlp"] = "mlp"
    """Which kind of head."""
    out_dim: int = Field(default=256, ge=2, le=262144)
    """K, the dimension of the output."""
    hidden_dim: int = Field(default=4096, ge=1)
    """Width of the hidden layers."""
    layers_number: int = Field(default=2, ge=1)
    """Linear layers, the last one included."""
    activation: Activation = "relu"
    """Between the linear layers."""
    batch_norm: bool = True
    """Batch normalisation after each hidden linear layer."""
    small_start: bool = False
    """Starts the linear layers with weights of std 0.02 and no biases, as the paper's head; False as torch's layers."""

    def build(self, embed_dim: int) -> "MLPHead":
        widths = [embed_dim, *[self.hidden_dim] * (self.layers_number - 1), self.out_dim]
        layers = mlp(widths, activation=self.activation, batch_norm=self.batch_norm, small_start=self.small_start)
        return MLPHead(layers, self.out_dim)


class MLPHead(Head):
    """Features to outputs; a predictor has its place after it."""

    def __init__(self, layers: nn.Sequential, out_dim: int) -> None:
        super().__init__()
        self.mlp = layers
        self.projected_dim = out_dim

    def project(self, features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B P"]:
        return self.mlp(features)  # type: ignore[no-any-return]

    def logits(self, projected: Float[Tensor, "*B P"]) -> Float[Tensor, "*B K"]:
        return projected


class Classifier(Head):
    """Features to logits of classes by one linear layer, which starts as DeiT's."""

    def __init__(self, embed_dim: int, classes_number: int) -> None:
        super().__init__()
        self.projected_dim = embed_dim
        self.linear = nn.Linear(embed_dim, classes_number)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def project(self, features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return features

    def logits(self, projected: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        return self.linear(projected)  # type: ignore[no-any-return]


class NoPredictor(Settings):
    """The student's output is compared as it is."""

    kind: Literal["none"] = "none"
    """Whether the student predicts."""

    def build(self, projected_dim: int) -> None:
        return None


class MLPPredictor(Settings):
    """An MLP that only the student has: from its projection to the teacher's, as in BYOL.

    With the paper's head it stands before the l2 normalisation of the bottleneck; the paper does not say where its
    row with a predictor has it.

    Source: BYOL (arXiv:2006.07733), section 3.2.
    """

    kind: Literal["mlp"] = "mlp"
    """Whether the student predicts."""
    hidden_dim: int = Field(default=4096, ge=1)
    """Width of its hidden layer."""
    activation: Activation = "relu"
    """After its hidden layer."""
    batch_norm: bool = True
    """Batch normalisation of its hidden layer."""
    small_start: bool = False
    """Starts its layers with weights of std 0.02 and no biases, as the paper's head; False as torch's layers, whose
    biases are far larger than what the paper's head projects at its start."""

    def build(self, projected_dim: int) -> nn.Module:
        widths = [projected_dim, self.hidden_dim, projected_dim]
        return mlp(widths, activation=self.activation, batch_norm=self.batch_norm, small_start=self.small_start)


def mlp(widths: list[int], *, activation: Activation, batch_norm: bool, small_start: bool) -> nn.Sequential:
    """Linear layers of these widths, with normalisation and activation after all but the last.

    Source of the small start: vision_transformer.py, DINOHead._init_weights.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        norm = [nn.BatchNorm1d(after)] if batch_norm else []
        layers += [nn.Linear(before, after), *norm, nn.GELU() if activation == "gelu" else nn.ReLU()]
    made = nn.Sequential(*layers[: -2 if batch_norm else -1])
    for layer in made:
        if small_start and isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return made


HeadSettings: TypeAlias = Annotated[BottleneckHeadSettings | MLPHeadSettings, Field(discriminator="kind")]
PredictorSettings: TypeAlias = Annotated[NoPredictor | MLPPredictor, Field(discriminator="kind")]
