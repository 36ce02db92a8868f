import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lab.core.networks.backbone import Backbone, VisionTransformer, _add_branch
from dino_lab.core.settings import KnobError

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "drop_path_rate": 0.0}


def tiny(name: str = "vit_tiny_patch16_224", **knobs: Any) -> Backbone:
    return Backbone(name=name, **(TINY | knobs))


def built(backbone: Backbone, image_size: int) -> VisionTransformer:
    """With all weights drawn, so that nothing is zero or one by its start."""
    torch.manual_seed(0)
    network = backbone.build(image_size)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def crops(size: int, number: int = 3) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


PLAIN_NAMES = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "deit_tiny_patch16_224",
    "vit_base_patch16_224_miil",  # no bias of queries, keys and values
    "vit_small_patch14_dinov2",  # layer scale
]


@pytest.mark.parametrize("name", PLAIN_NAMES)
@pytest.mark.parametrize(("size", "knobs"), [(16, {}), (32, {"depth": 1}), (24, {"patch_size": 4, "num_heads": 2})])
def test_features_are_timms_own_cls_tokens(name: str, size: int, knobs: dict[str, int]) -> None:
    network = built(tiny(name, **knobs), size).eval()
    images = crops(size)
    theirs = network.vit.forward_features(images)[:, 0]
    torch.testing.assert_close(network(images), theirs, rtol=1e-5, atol=1e-5)


def test_gradients_are_timms_own() -> None:
    network = built(tiny(), 16)
    images = crops(16)
    weights = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    found = []
    for features in (network(images), network.vit.forward_features(images)[:, 0]):
        network.zero_grad()
        (features * weights).sum().backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dimensions_that_are_not_set_are_the_names_own() -> None:
    vit = Backbone(name="vit_tiny_patch16_224").build(32).vit
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    assert {n: p.shape for n, p in vit.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize(
    ("name", "patch_size", "pixels"),
    [("vit_tiny_patch16_224", None, 16), ("vit_small_patch14_dinov2", None, 14), ("vit_tiny_patch16_224", 4, 4)],
)
def test_the_patch_size_is_read_from_the_name_where_it_is_not_set(
    name: str, patch_size: int | None, pixels: int
) -> None:
    assert Backbone(name=name, patch_size=patch_size).patch_pixels == pixels


def test_the_cls_token_starts_as_the_references() -> None:
    torch.manual_seed(0)
    tokens = torch.cat([tiny().build(16).vit.cls_token.flatten() for _ in range(20)])
    assert tokens.std().item() == pytest.approx(0.02, rel=0.2)


# ---------------------------------------------------------------------------------------- position embeddings


def reference_position(pos_embed: Tensor, width: int, height: int, patch_size: int, tokens: int) -> Tensor:
    """As in the reference: vision_transformer.py, interpolate_pos_encoding, with its names."""
    npatch, number = tokens - 1, pos_embed.shape[1] - 1
    if npatch == number and width == height:
        return pos_embed
    class_pos_embed, patch_pos_embed, dim = pos_embed[:, 0], pos_embed[:, 1:], pos_embed.shape[-1]
    w0, h0 = width // patch_size + 0.1, height // patch_size + 0.1
    side = int(math.sqrt(number))
    patch_pos_embed = F.interpolate(
        patch_pos_embed.reshape(1, side, side, dim).permute(0, 3, 1, 2),
        scale_factor=(w0 / math.sqrt(number), h0 / math.sqrt(number)),
        mode="bicubic",
    )
    assert (int(w0), int(h0)) == patch_pos_embed.shape[-2:]
    return torch.cat((class_pos_embed[None], patch_pos_embed.permute(0, 2, 3, 1).view(1, -1, dim)), dim=1)


@pytest.mark.parametrize(("trained", "size"), [(32, 32), (32, 16), (32, 8), (32, 24), (32, 64), (224, 96), (48, 56)])
def test_positions_of_other_sizes_are_the_references(trained: int, size: int) -> None:
    network = built(tiny(), trained)
    side = size // 8
    theirs = reference_position(network.vit.pos_embed, size, size, 8, side * side + 1)
    torch.testing.assert_close(network._position(side, side), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("size", [8, 24, 64])
def test_crops_of_other_sizes_get_features(size: int) -> None:
    features = built(tiny(), 32)(crops(size))
    assert features.shape == (3, 24)
    assert features.isfinite().all()


# -------------------------------------------------------------------------------------------------- drop path


def test_drop_path_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000, 1, 4)
    out = _add_branch(x, lambda x: 2 * x + 1, x, drop_rate=0.3)
    left_out = (out == x).all(dim=-1).flatten()
    assert left_out.float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(out[~left_out], (x + (2 * x + 1) / 0.7)[~left_out])
    torch.testing.assert_close((out - x).mean(dim=0), (2 * x + 1).mean(dim=0), rtol=0.05, atol=0.05)


def test_drop_path_may_leave_out_every_image() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, requires_grad=True)
    outs = [_add_branch(x, lambda x: 2 * x, x, drop_rate=0.9) for _ in range(20)]
    assert any(torch.equal(out, x) for out in outs)
    sum(out.sum() for out in outs).backward()
    assert x.grad is not None


def test_a_dropped_networks_features_average_to_those_of_its_branches() -> None:
    """One block, with features read before the last norm: there the expectation is exact to first order."""
    network = built(tiny(depth=1), 16)
    network.vit.norm = torch.nn.Identity()
    network.vit.blocks[0].mlp.fc2.weight.data.zero_()  # the second branch sees the first, which is not linear
    network.vit.blocks[0].mlp.fc2.bias.data.zero_()
    images = crops(16, number=1)
    whole = network(images)
    network.vit.blocks[0].drop_path1 = timm.layers.DropPath(0.4)
    torch.manual_seed(0)
    many = network(images.expand(4000, -1, -1, -1))
    torch.testing.assert_close(many.mean(dim=0, keepdim=True), whole, rtol=0, atol=0.05)
    assert many.std(dim=0).max() > 0.1


def test_drop_path_rises_linearly_with_depth_and_is_off_in_evaluation() -> None:
    network = built(tiny(depth=5, drop_path_rate=0.4), 16)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in network.vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert not torch.equal(network(crops(16)), network(crops(16)))
    network.eval()
    assert torch.equal(network(crops(16)), network(crops(16)))


# ----------------------------------------------------------------------------------------------------- errors


def test_an_unknown_name_is_refused_with_the_nearest_ones() -> None:
    with pytest.raises(KnobError, match=r"vit_tinny_patch16_224.*did you mean .*vit_tiny_patch16_224"):
        Backbone(name="vit_tinny_patch16_224").build(32)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "vit_small_patch16_18x2_224",  # parallel blocks
        "vit_base_patch16_siglip_224",  # no CLS token
        "vit_small_patch14_reg4_dinov2",  # registers
        "vit_base_patch16_clip_224",  # a norm before the blocks
        "deit3_small_patch16_224",  # a CLS token without a position
        "vit_tiny_r_s16_p8_224",  # patches of a ResNet
    ],
)
def test_a_network_that_would_be_run_wrongly_is_refused(name: str) -> None:
    with pytest.raises(KnobError, match="not a plain vision transformer"):
        tiny(name).build(32)


def test_heads_that_do_not_divide_the_dimension_are_refused() -> None:
    with pytest.raises(KnobError, match=r"backbone.embed_dim = 24, backbone.num_heads = 5: dim should be divisible"):
        tiny("vit_tiny_patch16_224", num_heads=5).build(32)
