"""The DINO projection head: an MLP, an l2-normalised bottleneck, a weight-normed last layer."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dino_lab.core.settings import Settings


class Head(Settings):
    """Knobs of the projection head, the same for student and teacher."""

    out_dim: int = Field(default=65536, ge=2, le=262144)
    """K, the number of prototypes: the dimension of the logits."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the hidden layers."""
    bottleneck_dim: int = Field(default=256, ge=1)
    """Dimension that is l2-normalised before the last layer."""
    layers_number: int = Field(default=3, ge=1)
    """Linear layers before the last one."""
    norm_last_layer: bool = True
    """Holds the length of each prototype at 1; False lets it be learned."""

    @property
    def entropy_of_uniform(self) -> float:
        """ln K, the largest entropy that targets can have, nats."""
        return math.log(self.out_dim)

    def build(self, embed_dim: int) -> "DINOHead":
        return DINOHead(
            embed_dim,
            out_dim=self.out_dim,
            hidden_dim=self.hidden_dim,
            bottleneck_dim=self.bottleneck_dim,
            layers_number=self.layers_number,
            norm_last_layer=self.norm_last_layer,
        )


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


class DINOHead(nn.Module):
    """Features to logits.

    Source: DINO (arXiv:2104.14294), Appendix C; vision_transformer.py, DINOHead.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        out_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        layers_number: int,
        norm_last_layer: bool,
    ) -> None:
        super().__init__()
        widths = [embed_dim, *[hidden_dim] * (layers_number - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(layers_number):
            layers += [nn.Linear(widths[i], widths[i + 1]), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, learn_length=not norm_last_layer)

    def forward(self, features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        return self.last_layer(F.normalize(self.mlp(features), dim=-1))  # type: ignore[no-any-return]
