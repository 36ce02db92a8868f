"""The backbone: a timm network, run for one feature an image on crops of several sizes."""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from dino_lab.core.distributed import own, workers
from dino_lab.core.settings import KnobError, Settings


class Backbone(Settings):
    """A timm network by name: a plain vision transformer, an XCiT or a ResNet.

    Dimensions that are set replace those of the name, and are let go with it; a ResNet has none of them.
    """

    let_go: ClassVar[Mapping[str, tuple[str, ...]]] = {"name": ("patch_size", "embed_dim", "depth", "num_heads")}

    name: str = "vit_small_patch16_224"
    """timm's name of it."""
    patch_size: int | None = Field(default=None, ge=1)
    """Side of a patch, pixels; None takes the name's own. An XCiT's is 8 or 16."""
    embed_dim: int | None = Field(default=None, ge=1)
    """D, the dimension of a feature; None takes the name's own."""
    depth: int | None = Field(default=None, ge=1)
    """Number of blocks; None takes the name's own."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads of a block; None takes the name's own."""
    drop_path_rate: float = Field(default=0.1, ge=0, lt=1)
    """Chance of leaving out the last block's branches for an image, rising linearly from 0 at the first; of an XCiT,
    any block's. Student only."""

    @property
    def patch_pixels(self) -> int:
        """Side of a patch, read from the name where it is not set; 1 for networks without patches."""
        found = re.search(r"_p(?:atch)?(\d+)", self.name)
        return self.patch_size or (int(found[1]) if found else 1)

    @property
    def has_tokens(self) -> bool:
        """Whether it is a plain vision transformer, which can hide patches and give a feature for each."""
        return self.name.startswith(("vit_", "deit_"))

    def build(self, image_size: int) -> "VisionTransformer | Pooled":
        """Builds it for position embeddings of `image_size` pixels; crops of other sizes are interpolated to.

        Raises:
            KnobError: timm does not know the name, it is of another family, or its dimensions do not fit.
        """
        import timm  # here, since it takes two seconds that planning a sweep need not wait for

        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, timm.list_models(), n=3)
            raise KnobError(f"backbone.name = {self.name!r}: unknown to timm; did you mean {' or '.join(near)}?")
        if timm.models.is_model_in_modules(self.name, {"vision_transformer", "deit"}):
            vit = self._create({"img_size": image_size})
            if not _is_plain(vit):
                raise KnobError(f"backbone.name = {self.name!r}: not a plain vision transformer with a CLS token")
            return VisionTransformer(vit)
        if timm.models.is_model_in_modules(self.name, {"xcit"}):
            if self.patch_size not in (None, 8, 16):
                raise KnobError(
                    f"backbone.patch_size = {self.patch_size}: not possible with backbone.name = {self.name!r}; "
                    "allowed are 8 and 16"
                )
            xcit = self._create({"img_size": image_size})
            if xcit.embed_dim % xcit.blocks[0].attn.num_heads:
                raise KnobError(
                    f"backbone.embed_dim = {xcit.embed_dim}, "
                    f"backbone.num_heads = {xcit.blocks[0].attn.num_heads}: heads must divide the dimension"
                )
            return Pooled(xcit)
        if timm.models.is_model_in_modules(self.name, {"resnet"}):
            return Pooled(self._create({}))
        raise KnobError(f"backbone.name = {self.name!r}: allowed are plain vision transformers, XCiTs and ResNets")

    def _create(self, further: dict[str, Any]) -> Any:
        import timm

        chosen: dict[str, Any] = {
            "patch_size": self.patch_size,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        try:
            return timm.create_model(
                self.name,
                pretrained=False,
                num_classes=0,
                drop_path_rate=self.drop_path_rate,
                **chosen,
                **further,
            )
        except (AssertionError, TypeError) as error:
            knobs = ", ".join(f"backbone.{name} = {value}" for name, value in chosen.items())
            raise KnobError(f"{knobs}: not possible with backbone.name = {self.name!r}: {error}") from None


def _is_plain(vit: Any) -> bool:
    """Whether a timm ViT has nothing that `VisionTransformer` would leave out."""
    return (
        type(vit).__name__ == "VisionTransformer"
        and type(vit.norm_pre) is type(vit.patch_embed.norm) is type(vit.fc_norm) is nn.Identity
        and {type(block).__name__ for block in vit.blocks} == {"Block"}
        and type(vit.blocks[0].attn.q_norm) is nn.Identity
        and vit.cls_token is not None
        and vit.pos_embed is not None
        and vit.num_prefix_tokens == 1
        and vit.pos_embed.shape[1] == vit.patch_embed.num_patches + 1
    )


class Pooled(nn.Module):
    """A timm network whose own forward gives one feature an image: a ResNet's mean, an XCiT's CLS token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.embed_dim: int = model.num_features

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.model(images)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Seen:
    """What evaluations read of a vision transformer in use."""

    blocks: Float[Tensor, "n B D"]
    """The CLS token after each of the last blocks, and after the last norm; the last one is the feature."""
    patches: Float[Tensor, "B D"]
    """The mean of the patches after the last block and the last norm."""
    attention: Float[Tensor, "B H N"]
    """How much the CLS token attends to each patch in the last block, by head; with itself, this sums to 1."""


_Attention: TypeAlias = Callable[[Any, Tensor], Tensor]
"""timm's attention module and tokens, to tokens."""


class VisionTransformer(nn.Module):
    """Runs a timm ViT's own modules in the order that self-distillation needs.

    Departures from timm's forward that change no result: the last block is computed for the CLS token alone,
    since nothing else is read; drop path computes only the branches that it keeps; attention is the plain
    form on CPU, where the fused kernel gains nothing. One that does: position embeddings are interpolated as
    in the reference.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        self.embed_dim: int = vit.embed_dim
        # timm starts the CLS token at 1e-6, the reference at 0.02.
        nn.init.trunc_normal_(vit.cls_token, std=0.02)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """The CLS token's feature."""
        *blocks, last = self.vit.blocks
        x = self.tokens(images)
        for block in blocks:
            x = self._block(block, x, x, _attention)
        features: Tensor = self.vit.norm(self._block(last, x[:, :1], x, _cls_attention))[:, 0]
        return features

    def tokens(
        self,
        images: Float[Tensor, "B 3 H W"],
        *,
        hidden: Bool[Tensor, "B N"] | None = None,
        mask_token: Float[Tensor, "D"] | None = None,
    ) -> Float[Tensor, "B 1+N D"]:
        """CLS token and patches with their positions, before the first block; `mask_token` in place of the hidden."""
        grid = self.vit.patch_embed.proj(images)
        patches = grid.flatten(2).mT
        if hidden is not None:
            assert mask_token is not None
            patches = torch.where(hidden[..., None], mask_token.to(patches.dtype), patches)
        cls = self.vit.cls_token.expand(len(images), -1, -1)
        return torch.cat([cls, patches], dim=1) + self._position(*grid.shape[-2:])

    def encode(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """All of these tokens after all blocks and the last norm."""
        for block in self.vit.blocks:
            tokens = self._block(block, tokens, tokens, _attention)
        return self.vit.norm(tokens)  # type: ignore[no-any-return]

    def look(self, images: Float[Tensor, "B 3 H W"], *, blocks_number: int) -> Seen:
        """What evaluations read of these images, in one pass; all blocks if there are no more than `blocks_number`.

        Source: dino, vision_transformer.py, get_intermediate_layers and get_last_selfattention.
        """
        *blocks, last = self.vit.blocks
        x = self.tokens(images)
        cls = []
        for block in blocks:
            x = self._block(block, x, x, _attention)
            cls.append(x[:, 0])
        attention = _cls_weights(last.attn, last.norm1(x))[..., 1:]
        x = self._block(last, x, x, _attention)
        cls.append(x[:, 0])
        return Seen(
            blocks=self.vit.norm(torch.stack(cls[-blocks_number:])),
            patches=self.vit.norm(x[:, 1:]).mean(dim=1),
            attention=attention,
        )

    def _position(self, height: int, width: int) -> Float[Tensor, "1 N D"]:
        """Position embeddings of a grid of patches, the CLS token's own apart.

        Source: dino, vision_transformer.py, interpolate_pos_encoding: bicubic, scale factor (size + 0.1) / grid.
        """
        embedding: Tensor = self.vit.pos_embed
        side = math.isqrt(embedding.shape[1] - 1)
        if (height, width) == (side, side):
            return embedding
        grid = embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((height + 0.1) / side, (width + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([embedding[:, :1], grid.flatten(2).mT], dim=1)

    def _block(
        self, block: Any, x: Float[Tensor, "B Q D"], attended: Float[Tensor, "B N D"], attention: _Attention
    ) -> Float[Tensor, "B Q D"]:
        """A pre-norm block for the tokens x, which attend to all."""

        def attend(tokens: Tensor) -> Tensor:
            return block.ls1(attention(block.attn, block.norm1(tokens)))  # type: ignore[no-any-return]

        def feed_forward(tokens: Tensor) -> Tensor:
            return block.ls2(block.mlp(block.norm2(tokens)))  # type: ignore[no-any-return]

        rate = getattr(block.drop_path1, "drop_prob", 0.0) if self.training else 0.0
        x = _add_branch(x, attend, attended, drop_rate=rate)
        return _add_branch(x, feed_forward, x, drop_rate=rate)


def _add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], branch_input: Tensor, *, drop_rate: float) -> Tensor:
    """x + branch(branch_input); drop path leaves the branch out, and uncomputed, for some of the images."""
    if drop_rate == 0:
        return x + branch(branch_input)
    kept = (own(torch.rand(workers() * len(x), device=x.device)) >= drop_rate).nonzero()[:, 0]
    return x.index_add(0, kept, branch(branch_input.index_select(0, kept)).to(x.dtype), alpha=1 / (1 - drop_rate))


def _attention(attn: Any, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """Multi-head attention of all tokens to all tokens, with timm's weights. The one place where its form is chosen.

    On CPU head by head: a head's q, k and v are views that a batched product takes as they are, while all heads at once
    would be copied, forward and backward; the fused kernel's backward is slower there.
    """
    number = attn.num_heads
    tokens = attn.qkv(x).unflatten(-1, (3 * number, attn.head_dim))
    if x.is_cuda:
        out = F.scaled_dot_product_attention(*tokens.transpose(1, 2).split(number, dim=1)).transpose(1, 2).flatten(2)
    else:
        heads = zip(*(part.unbind(2) for part in tokens.split(number, dim=2)), strict=True)
        out = torch.cat([(q * attn.scale @ k.mT).softmax(dim=-1) @ v for q, k, v in heads], dim=-1)
    return attn.proj(out)  # type: ignore[no-any-return]


def _cls_attention(attn: Any, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B 1 D"]:
    """Multi-head attention of the CLS token alone, which needs no key or value of any other token.

    The weighted sum of W_v x is W_v times the weighted sum of x.
    """
    weight, bias = _by_head(attn)
    means = _cls_weights(attn, x) @ x
    out = torch.einsum("bhc,hdc->bhd", means, weight[2]) + bias[2]
    return attn.proj(out.flatten(1))[:, None]  # type: ignore[no-any-return]


def _cls_weights(attn: Any, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N"]:
    """How much the CLS token attends to each token, itself the first; they sum to 1.

    q . (W_k x) = (W_k^T q) . x. The bias of the keys adds the same to all of a head's scores, so softmax forgets it.
    """
    weight, bias = _by_head(attn)
    q = torch.einsum("bc,hdc->bhd", x[:, 0], weight[0]) + bias[0]
    scores = torch.einsum("bhd,hdc->bhc", q * attn.scale, weight[1]) @ x.mT
    return scores.softmax(dim=-1)


def _by_head(attn: Any) -> tuple[Float[Tensor, "3 H d D"], Float[Tensor, "3 H d"]]:
    """Weights and biases of queries, keys and values; biases are zero where it has none."""
    weight = attn.qkv.weight.unflatten(0, (3, attn.num_heads, attn.head_dim))
    bias = torch.zeros_like(weight[..., 0]) if attn.qkv.bias is None else attn.qkv.bias.view_as(weight[..., 0])
    return weight, bias


BackboneNetwork: TypeAlias = VisionTransformer | Pooled
