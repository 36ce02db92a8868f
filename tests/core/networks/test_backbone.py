import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lab.core.networks.backbone import Backbone, Pooled, VisionTransformer, _add_branch
from dino_lab.core.settings import KnobError

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "drop_path_rate": 0.0}


def tiny(name: str = "vit_tiny_patch16_224", **knobs: Any) -> Backbone:
    return Backbone(name=name, **(TINY | knobs))


def built(backbone: Backbone, image_size: int) -> VisionTransformer:
    """With all weights drawn, so that nothing is zero or one by its start."""
    network = drawn(backbone, image_size)
    assert isinstance(network, VisionTransformer)
    return network


def drawn(backbone: Backbone, image_size: int) -> VisionTransformer | Pooled:
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
    vit = built(Backbone(name="vit_tiny_patch16_224"), 32).vit
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    assert {n: p.shape for n, p in vit.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize(
    ("name", "patch_size", "pixels"),
    [
        ("vit_tiny_patch16_224", None, 16),
        ("vit_small_patch14_dinov2", None, 14),
        ("vit_tiny_patch16_224", 4, 4),
        ("deit_tiny_patch16_224", None, 16),
        ("vit_base_patch32_384", None, 32),
        ("xcit_nano_12_p16_224", None, 16),
        ("xcit_small_24_p8_384", None, 8),
        ("resnet18", None, 1),
        ("resnext50_32x4d", None, 1),
    ],
)
def test_the_patch_size_is_read_from_the_name_where_it_is_not_set(
    name: str, patch_size: int | None, pixels: int
) -> None:
    assert Backbone(name=name, patch_size=patch_size).patch_pixels == pixels


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "xcit_nano_12_p8_224"])
def test_the_patch_size_of_the_name_is_that_of_the_network(name: str) -> None:
    backbone = Backbone(name=name, embed_dim=24, depth=1, num_heads=3)
    network = backbone.build(8 * backbone.patch_pixels)
    grid: list[int] = []
    first = network.vit.patch_embed.proj if isinstance(network, VisionTransformer) else network.model.patch_embed.proj
    first.register_forward_hook(lambda module, images, output: grid.extend(output.shape[-2:]))
    network(crops(8 * backbone.patch_pixels))
    assert grid == [8, 8]


def test_the_cls_token_starts_as_the_references() -> None:
    torch.manual_seed(0)
    tokens = torch.cat([tiny().build(16).vit.cls_token.flatten() for _ in range(20)])
    assert tokens.std().item() == pytest.approx(0.02, rel=0.2)


# ----------------------------------------------------------------------------------------------------- tokens


def some_hidden(side: int, number: int = 3) -> Tensor:
    """About half of the patches, others in each image."""
    return torch.rand(number, side * side, generator=torch.Generator().manual_seed(4)) < 0.5


def patches(values: Tensor, side: int, patch_size: int) -> Tensor:
    """A map of pixels from one value a patch."""
    grid = values.unflatten(1, (side, side))[:, None]
    return grid.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)


@pytest.mark.parametrize("name", PLAIN_NAMES)
@pytest.mark.parametrize("size", [8, 16, 24])
def test_the_first_encoded_token_is_the_feature(name: str, size: int) -> None:
    network = built(tiny(name), 16).eval()
    tokens = network.tokens(crops(size))
    assert tokens.shape == (3, 1 + (size // 8) ** 2, 24)
    torch.testing.assert_close(network.encode(tokens)[:, 0], network(crops(size)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_encoded_tokens_are_timms_own(name: str) -> None:
    network = built(tiny(name), 32).eval()
    theirs = network.vit.forward_features(crops(32))
    torch.testing.assert_close(network.encode(network.tokens(crops(32))), theirs, rtol=1e-5, atol=1e-5)


def test_gradients_through_tokens_and_encode_are_timms_own() -> None:
    network = built(tiny(), 16)
    weights = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))
    found = []
    for tokens in (network.encode(network.tokens(crops(16))), network.vit.forward_features(crops(16))):
        network.zero_grad()
        (tokens * weights).sum().backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [2, 3])
def test_pixels_of_hidden_patches_do_not_influence_any_token(side: int) -> None:
    network = built(tiny(), 16).eval()
    hidden, mask_token = some_hidden(side), torch.randn(24)
    images = crops(8 * side)
    others = torch.where(patches(hidden, side, 8), torch.randn_like(images), images)
    assert not torch.equal(network.tokens(images), network.tokens(others))
    tokens = network.tokens(images, hidden=hidden, mask_token=mask_token)
    assert torch.equal(tokens, network.tokens(others, hidden=hidden, mask_token=mask_token))


@pytest.mark.parametrize("side", [2, 3])
def test_a_hidden_patch_is_the_mask_token_at_its_place_and_the_others_are_as_they_were(side: int) -> None:
    network = built(tiny(), 16)
    hidden, mask_token = some_hidden(side), torch.randn(24)
    plain = network.tokens(crops(8 * side))
    tokens = network.tokens(crops(8 * side), hidden=hidden, mask_token=mask_token)
    position = network._position(side, side)[0]
    assert hidden.any()
    assert not hidden.all()
    for image in range(3):
        assert torch.equal(tokens[image, 0], plain[image, 0])
        for patch in range(side * side):
            ours = tokens[image, 1 + patch]
            if hidden[image, patch]:
                torch.testing.assert_close(ours, mask_token + position[1 + patch])
            else:
                assert torch.equal(ours, plain[image, 1 + patch])


def test_the_mask_token_gets_a_gradient_for_each_hidden_patch() -> None:
    network = built(tiny(), 16)
    hidden, mask_token = some_hidden(2), torch.zeros(24, requires_grad=True)
    network.tokens(crops(16), hidden=hidden, mask_token=mask_token).sum().backward()
    torch.testing.assert_close(mask_token.grad, torch.full((24,), float(hidden.sum())))


def test_the_order_of_tokens_changes_nothing_but_their_order() -> None:
    network = built(tiny(), 32).eval()
    tokens = network.tokens(crops(32))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(network.encode(tokens[:, order]), network.encode(tokens)[:, order], rtol=1e-5, atol=1e-5)


def test_tokens_that_are_left_out_have_no_influence() -> None:
    network = built(tiny(), 32).eval()
    tokens = network.tokens(crops(32))
    kept = [0, 3, 5, 16]
    theirs = tokens[:, kept]
    for block in network.vit.blocks:
        theirs = block(theirs)
    torch.testing.assert_close(network.encode(tokens[:, kept]), network.vit.norm(theirs), rtol=1e-5, atol=1e-5)


def test_drop_path_is_in_encode_too() -> None:
    network = built(tiny(drop_path_rate=0.5), 16)
    tokens = network.tokens(crops(16, number=8))
    assert not torch.equal(network.encode(tokens), network.encode(tokens))
    network.eval()
    assert torch.equal(network.encode(tokens), network.encode(tokens))


# ------------------------------------------------------------------------------------------- XCiTs and ResNets

XCIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("xcit_nano_12_p16_224", XCIT),
        ("xcit_nano_12_p8_224", XCIT),
        ("xcit_tiny_12_p16_224", {"depth": 1}),
        ("resnet18", {}),
        ("resnet10t", {}),
    ],
)
@pytest.mark.parametrize("size", [32, 64])
def test_pooled_features_are_timms_own_forward(name: str, knobs: dict[str, int], size: int) -> None:
    """Whatever the size of the crop; the ResNet's is the mean of its last map, the XCiT's its CLS token."""
    network = drawn(Backbone(name=name, **knobs), 32)
    assert isinstance(network, Pooled)
    network(crops(32))  # so that running statistics are not those of the start
    network.eval()
    theirs = timm.create_model(name, num_classes=0, **knobs).eval()
    theirs.load_state_dict(network.model.state_dict())
    features = network(crops(size))
    assert features.shape == (3, network.embed_dim)
    torch.testing.assert_close(features, theirs(crops(size)), rtol=1e-5, atol=1e-5)
    maps = theirs.forward_features(crops(size))
    ours = maps.mean(dim=(2, 3)) if name.startswith("resnet") else maps[:, 0]
    torch.testing.assert_close(features, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "embed_dim"), [("resnet18", 512), ("resnet50", 2048), ("xcit_nano_12_p16_224", 128)])
def test_dimensions_of_a_feature_are_the_names_own(name: str, embed_dim: int) -> None:
    network = Backbone(name=name).build(32)
    assert network.embed_dim == embed_dim
    assert network.eval()(crops(32)).shape == (3, embed_dim)


def test_dimensions_that_are_set_are_those_of_an_xcit() -> None:
    network = Backbone(name="xcit_nano_12_p16_224", **XCIT).build(32)
    assert isinstance(network, Pooled)
    assert (network.embed_dim, len(network.model.blocks)) == (32, 2)
    assert network.model.blocks[0].attn.num_heads == 2


@pytest.mark.parametrize(("name", "knobs"), [("xcit_nano_12_p16_224", XCIT), ("resnet18", {})])
def test_drop_path_of_a_pooled_network_is_the_knobs_and_is_off_in_evaluation(name: str, knobs: dict[str, int]) -> None:
    network = drawn(Backbone(name=name, drop_path_rate=0.4, **knobs), 32)
    rates = [module.drop_prob for module in network.modules() if isinstance(module, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.4)
    without = copy.deepcopy(network).eval()
    for module in without.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    assert not torch.equal(network(crops(32, number=8)), network(crops(32, number=8)))
    network.load_state_dict(without.state_dict())  # the running statistics too
    network.eval()
    assert torch.equal(network(crops(32)), without(crops(32)))


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("vit_tiny_patch16_224", TINY), ("deit_tiny_patch16_224", TINY), ("xcit_nano_12_p16_224", XCIT), ("resnet18", {})],
)
def test_a_plain_vision_transformer_has_tokens_and_nothing_else(name: str, knobs: dict[str, Any]) -> None:
    backbone = Backbone(name=name, **knobs)
    assert isinstance(backbone.build(32), VisionTransformer) is backbone.has_tokens


# ------------------------------------------------------------------------------------------ what evaluations read


def timms_own(network: VisionTransformer, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Tokens after each block and the last norm, and the last block's softmax, by timm's modules."""
    vit, size = network.vit, images.shape[-1]
    patches = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(len(images), -1, -1), patches], dim=1)
    x = x + reference_position(vit.pos_embed, size, size, 8, x.shape[1])
    softmax: list[Tensor] = []
    vit.blocks[-1].attn.fused_attn = False
    vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, inputs, output: softmax.append(output))
    outputs = []
    for block in vit.blocks:
        x = block(x)
        outputs.append(vit.norm(x))
    return outputs, softmax[0]


@pytest.mark.parametrize("name", PLAIN_NAMES)
@pytest.mark.parametrize("size", [8, 16, 24, 48])
def test_what_is_seen_is_what_timms_modules_give(name: str, size: int) -> None:
    network = built(tiny(name, depth=3), 16).eval()
    seen = network.look(crops(size), blocks_number=2)
    outputs, softmax = timms_own(network, crops(size))
    cls = torch.stack([tokens[:, 0] for tokens in outputs[-2:]])
    torch.testing.assert_close(seen.blocks, cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.patches, outputs[-1][:, 1:].mean(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.attention, softmax[:, :, 0, 1:], rtol=1e-5, atol=1e-5)
    assert seen.attention.shape == (3, 3, (size // 8) ** 2)


@pytest.mark.parametrize("name", PLAIN_NAMES)
@pytest.mark.parametrize("size", [8, 24])
def test_the_last_of_the_blocks_is_the_feature(name: str, size: int) -> None:
    network = built(tiny(name), 16).eval()
    seen = network.look(crops(size), blocks_number=1)
    torch.testing.assert_close(seen.blocks, network(crops(size))[None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("blocks_number", "number"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_as_many_blocks_are_seen_as_there_are(blocks_number: int, number: int) -> None:
    network = built(tiny(depth=4), 16).eval()
    everything = network.look(crops(16), blocks_number=4).blocks
    assert torch.equal(network.look(crops(16), blocks_number=blocks_number).blocks, everything[-number:])


def test_without_queries_all_tokens_get_the_same_attention_the_cls_token_too() -> None:
    network = built(tiny(depth=1), 16).eval()
    qkv = network.vit.blocks[0].attn.qkv
    qkv.weight.data[:24], qkv.bias.data[:24] = 0, 0
    seen = network.look(crops(24), blocks_number=1)
    torch.testing.assert_close(seen.attention, torch.full((3, 3, 9), 1 / 10))


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
        "convnext_atto",
        "efficientnet_b0",
        "swin_tiny_patch4_window7_224",
        "vit_tiny_r_s16_p8_224",  # patches of a ResNet
    ],
)
def test_a_network_of_another_family_is_refused(name: str) -> None:
    with pytest.raises(KnobError, match=f"backbone.name = '{name}': allowed are plain vision transformers, XCiTs"):
        Backbone(name=name).build(32)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_18x2_224",  # parallel blocks
        "vit_base_patch16_siglip_224",  # no CLS token
        "vit_small_patch14_reg4_dinov2",  # registers
        "vit_base_patch16_clip_224",  # a norm before the blocks
        "deit3_small_patch16_224",  # a CLS token without a position
        "eva_large_patch14_196",  # the mean of patches with a norm of its own, in place of the CLS token
    ],
)
def test_a_network_that_would_be_run_wrongly_is_refused(name: str) -> None:
    with pytest.raises(KnobError, match="not a plain vision transformer"):
        tiny(name).build(32)


@pytest.mark.parametrize("knob", ["patch_size", "embed_dim", "depth", "num_heads"])
def test_a_knob_that_a_resnet_does_not_have_is_refused_by_name(knob: str) -> None:
    with pytest.raises(KnobError, match=f"backbone.{knob} = 8: not possible with backbone.name = 'resnet18'"):
        Backbone(name="resnet18").but({knob: 8}).build(32)


def test_a_patch_size_that_an_xcit_cannot_have_is_refused_by_name() -> None:
    with pytest.raises(KnobError, match=r"backbone.patch_size = 4: not possible with backbone.name = 'xcit_nano"):
        Backbone(name="xcit_nano_12_p16_224", patch_size=4).build(32)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "xcit_nano_12_p16_224"])
def test_heads_that_do_not_divide_the_dimension_are_refused(name: str) -> None:
    with pytest.raises(KnobError, match=r"backbone.embed_dim = 24, .*backbone.num_heads = 5"):
        Backbone(name=name, embed_dim=24, depth=1, num_heads=5).build(32)
