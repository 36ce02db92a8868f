"""MAE: the pixels of hidden patches from those in sight (arXiv:2111.06377); no teacher, and no two crops compared."""

from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from dino_lab.core.distributed import own, workers
from dino_lab.core.methods.method import Batch, Method, Outcome, Surroundings
from dino_lab.core.methods.patches import PatchMean, hidden_number, places, random_masks, with_patches
from dino_lab.core.networks.backbone import BackboneNetwork, VisionTransformer
from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings


class MAE(Settings):
    """A masked autoencoder on the global crops, each for itself; local crops are not used.

    Departs from the source where the lab's backbone does: its position embeddings are learned, and it has drop path
    unless `backbone.drop_path_rate` is 0, which the source has none of. Crops are the trial's, the source's are resized
    and flipped only.

    Source: MAE (arXiv:2111.06377), section 3 and Appendix A.1; models_mae.py.
    """

    kind: Literal["mae"] = "mae"
    """Which method."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Part of a global crop's patches that the encoder does not see; rounded to patches, at least one, never all."""
    norm_pixels: bool = True
    """Predicts the pixels of a patch less their mean and over their standard deviation; False predicts them as they
    are."""
    decoder_dim: int = Field(default=512, ge=4)
    """Width of the decoder."""
    decoder_depth: int = Field(default=8, ge=1)
    """Blocks of the decoder."""
    decoder_num_heads: int = Field(default=16, ge=1)
    """Attention heads of a block of the decoder."""

    @model_validator(mode="after")
    def _decoder_divides(self) -> Self:
        if self.decoder_dim % self.decoder_num_heads or self.decoder_dim % 4:
            raise ValueError(
                f"method.decoder_dim = {self.decoder_dim}: must be a multiple of "
                f"method.decoder_num_heads = {self.decoder_num_heads}, and of 4 for its position embeddings"
            )
        return self

    def build(self, backbone: BackboneNetwork, surroundings: Surroundings) -> "MAEMethod":
        """Builds encoder and decoder.

        Raises:
            ValueError: the backbone has no patches that can be hidden.
        """
        vit, side = with_patches(backbone, surroundings.image_size, method=self.kind)
        decoder = Decoder(
            vit.embed_dim,
            self.decoder_dim,
            depth=self.decoder_depth,
            num_heads=self.decoder_num_heads,
            side=side,
            patch_values=3 * (surroundings.image_size // side) ** 2,
        )
        return MAEMethod(Autoencoder(vit, decoder), side=side, settings=self)


# ------------------------------------------------------------------------------------------------------- pixels


def pixels(crops: Float[Tensor, "B 3 S S"], side: int) -> Float[Tensor, "B N P"]:
    """The values of each of side x side patches, row by row, a pixel's three channels together."""
    rows = crops.unflatten(2, (side, -1)).unflatten(4, (side, -1))
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # type: ignore[no-any-return]


def normalised(patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
    """Each patch less its mean and over its standard deviation; a patch of one colour in one channel becomes 0.

    Source: models_mae.py, forward_loss: the variance with P - 1, and 1e-6 added to it.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def hidden_error(
    predictions: Float[Tensor, "B N P"], targets: Float[Tensor, "B N P"], hidden: Bool[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Mean squared error over the values of hidden patches; predictions of the others count nothing."""
    errors = (predictions - targets).square().mean(dim=-1)
    return (errors * hidden).sum() / hidden.sum()


# ------------------------------------------------------------------------------------------------------ networks


def sincos_positions(side: int, dim: int) -> Float[Tensor, "N D"]:
    """Fixed position embeddings of side x side patches: sines and cosines of the column, then of the row.

    Source: models_mae.py, util.pos_embed.get_2d_sincos_pos_embed.
    """
    frequencies = 10000 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=1)


class Decoder(nn.Module):
    """Tokens of the visible patches to pixels of all: a small vision transformer, used in training alone.

    Source: MAE (arXiv:2111.06377), section 3; models_mae.py, forward_decoder and _init_weights.
    """

    positions: Float[Tensor, "N D"]

    def __init__(self, embed_dim: int, dim: int, *, depth: int, num_heads: int, side: int, patch_values: int) -> None:
        from timm.layers.norm import LayerNorm  # here, since planning a sweep need not wait for timm
        from timm.models.vision_transformer import Block

        super().__init__()
        self.embed = nn.Linear(embed_dim, dim)
        # Two dimensions, since those of one get no weight decay.
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, dim), std=0.02))
        # The CLS token's own is 0. A function of the settings, so no checkpoint needs to hold it.
        positions = torch.cat([torch.zeros(1, dim), sincos_positions(side, dim)])
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(*[Block(dim, num_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.predict = nn.Linear(dim, patch_values)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, encoded: Float[Tensor, "B T E"], visible: Int64[Tensor, "B M"]) -> Float[Tensor, "B N P"]:
        """Predictions of all patches, from CLS token and visible patches and where those were."""
        embedded: Tensor = self.embed(encoded)
        patches_number = len(self.positions) - 1
        patches = self.mask_token.to(embedded.dtype).expand(len(encoded), patches_number, -1)
        index = visible[..., None].expand_as(embedded[:, 1:])
        tokens = torch.cat([embedded[:, :1], patches.scatter(1, index, embedded[:, 1:])], dim=1)
        decoded = self.blocks(tokens + self.positions)
        return self.predict(self.norm(decoded[:, 1:]))  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """Backbone and decoder."""

    def __init__(self, backbone: VisionTransformer, decoder: Decoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def encode(self, crops: Float[Tensor, "B 3 S S"], visible: Int64[Tensor, "B M"]) -> Float[Tensor, "B 1+M D"]:
        """CLS token and visible patches, which got their positions before they were chosen."""
        tokens = self.backbone.tokens(crops)
        patches = tokens[:, 1:].take_along_dim(visible[..., None], dim=1)
        return self.backbone.encode(torch.cat([tokens[:, :1], patches], dim=1))


# ---------------------------------------------------------------------------------------------------- the method


class MAEMethod(Method):
    """An autoencoder; it has no teacher."""

    student: Autoencoder

    def __init__(self, student: Autoencoder, *, side: int, settings: MAE) -> None:
        super().__init__(student)
        self.settings = settings
        self.side = side

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """Mean squared error of the pixels of hidden patches.

        Pixels are those of the crops, which have ImageNet's mean and standard deviation taken out, as in the source.
        Features are means over the patches that the encoder saw.

        Source: MAE (arXiv:2111.06377), section 3, "Reconstruction target".
        """
        crops = batch.global_crops.flatten(0, 1)
        patches_number = self.side**2
        hidden_patches = hidden_number(self.settings.mask_ratio, patches_number)
        hidden = own(random_masks(workers() * len(crops), patches_number, hidden_patches))
        visible = places(~hidden).to(crops.device)
        encoded = self.student.encode(crops, visible)
        predictions = self.student.decoder(encoded, visible)

        targets = pixels(crops.float(), self.side)
        if self.settings.norm_pixels:
            targets = normalised(targets)
        features = encoded[:, 1:].detach().float().mean(dim=1).unflatten(0, batch.global_crops.shape[:2])
        return Outcome(hidden_error(predictions.float(), targets, hidden.to(crops.device)), features)

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": PatchMean(self.student.backbone)}
