"""MAE against plain loops over patches and pixels, and against timm's own modules."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from lightly.models.utils import get_2d_sine_cosine_positional_embedding
from torch import Tensor

from dino_lab.core.methods.mae import MAE, MAEMethod, hidden_error, normalised, pixels, sincos_positions
from dino_lab.core.methods.patches import places
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.settings import KnobError

from . import small
from .small import FINE, PATCH, SIDE, SIZE, SURROUNDINGS, N, now, over, same, state, take_step

B, VALUES = 3, 3 * PATCH * PATCH
batch = partial(small.batch, images=B)
DECODER = {"decoder_dim": 32, "decoder_depth": 2, "decoder_num_heads": 4}


def method(seed: int = 0, **knobs: float) -> MAEMethod:
    torch.manual_seed(seed)
    mae = MAE(**DECODER, **knobs).build(FINE.build(SIZE), SURROUNDINGS)
    with torch.no_grad():  # a learned position embedding starts near zero, where its absence would not show
        mae.student.backbone.vit.pos_embed.normal_()
    return mae


def masks(seed: int = 0, crops: int = B, number: int = 12) -> Tensor:
    order = torch.rand(crops, N, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < number


def patch_of(crop: Tensor, n: int) -> Tensor:
    """The pixels of patch n, channels last, as a flat vector."""
    top, left = PATCH * (n // SIDE), PATCH * (n % SIDE)
    return torch.stack([crop[c, top + y, left + x] for y in range(PATCH) for x in range(PATCH) for c in range(3)])


# ---------------------------------------------------------------------------------------------------- the loss


def test_pixels_of_patches_are_those_of_plain_loops() -> None:
    crops = batch().global_crops[0]
    patches = pixels(crops, SIDE)
    assert patches.shape == (B, N, VALUES)
    for i in range(B):
        for n in range(N):
            assert torch.equal(patches[i, n], patch_of(crops[i], n))


def test_a_normalised_patch_has_mean_zero_and_variance_one() -> None:
    patches = 5 + 3 * torch.randn(B, N, VALUES, generator=torch.Generator().manual_seed(0))
    ours = normalised(patches)
    torch.testing.assert_close(ours.mean(dim=-1), torch.zeros(B, N), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.var(dim=-1), torch.ones(B, N), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised(2 * patches - 7), ours, atol=1e-4, rtol=0)


def test_two_values_in_equal_parts_normalise_to_their_closed_form() -> None:
    # Mean 3 and squared deviations of 4 each: the variance with P - 1 is 4 P / (P - 1).
    patch = torch.tensor([1.0, 5.0] * (VALUES // 2)).view(1, 1, VALUES)
    expected = 2 / math.sqrt(4 * VALUES / (VALUES - 1) + 1e-6)
    torch.testing.assert_close(normalised(patch), torch.tensor([-expected, expected] * (VALUES // 2)).view(1, 1, -1))


def test_a_patch_of_equal_values_normalises_to_zero() -> None:
    assert normalised(torch.full((1, 1, VALUES), 4.0)).abs().max() == 0


def test_the_error_is_the_mean_over_hidden_patches_and_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, targets = (torch.randn(B, N, VALUES, generator=generator) for _ in range(2))
    hidden = masks()
    errors = [
        (float(predictions[i, n, p]) - float(targets[i, n, p])) ** 2
        for i in range(B)
        for n in range(N)
        if hidden[i, n]
        for p in range(VALUES)
    ]
    assert hidden_error(predictions, targets, hidden).item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_predictions_of_visible_patches_do_not_count() -> None:
    predictions, targets = torch.zeros(B, N, VALUES, requires_grad=True), torch.ones(B, N, VALUES)
    hidden = masks()
    changed = predictions + 9 * ~hidden[..., None]
    assert hidden_error(changed, targets, hidden) == hidden_error(predictions, targets, hidden)
    hidden_error(predictions, targets, hidden).backward()
    assert torch.equal(predictions.grad.abs().sum(dim=-1) > 0, hidden)


@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.3])
def test_the_loss_is_that_of_plain_loops_over_hidden_patches(norm_pixels: bool, mask_ratio: float) -> None:
    mae, crops = method(norm_pixels=norm_pixels, mask_ratio=mask_ratio), batch()
    torch.manual_seed(5)
    outcome = mae.loss(crops, now())

    torch.manual_seed(5)
    noise = torch.rand(2 * B, N)
    errors, features = [], []
    for i, crop in enumerate(crops.global_crops.flatten(0, 1)):
        hidden = set(noise[i].argsort()[: round(mask_ratio * N)].tolist())
        visible = [n for n in range(N) if n not in hidden]
        with torch.no_grad():
            encoded = encode(mae, crop, visible)
            predictions = decode(mae, encoded, visible)
        features.append(encoded[1:].mean(dim=0))
        for n in hidden:
            target = patch_of(crop, n).double().numpy()
            if norm_pixels:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors += [(float(predictions[n, p]) - target[p]) ** 2 for p in range(VALUES)]
    assert len(errors) == 2 * B * round(mask_ratio * N) * VALUES
    assert outcome.loss.item() == pytest.approx(np.mean(errors), rel=1e-4)
    torch.testing.assert_close(outcome.features.flatten(0, 1), torch.stack(features), atol=1e-5, rtol=1e-4)
    assert not outcome.features.requires_grad


def encode(mae: MAEMethod, crop: Tensor, visible: list[int]) -> Tensor:
    """CLS token and visible patches of one crop, by timm's own modules."""
    vit = mae.student.backbone.vit
    patches = vit.patch_embed(crop[None])[0] + vit.pos_embed[0, 1:]
    tokens = torch.stack([vit.cls_token[0, 0] + vit.pos_embed[0, 0], *[patches[n] for n in visible]])
    return vit.norm(vit.blocks(tokens[None]))[0]


def decode(mae: MAEMethod, encoded: Tensor, visible: list[int]) -> Tensor:
    """Predictions of all patches of one crop, each token put where it belongs."""
    decoder = mae.student.decoder
    embedded = decoder.embed(encoded)
    table = get_2d_sine_cosine_positional_embedding(32, SIDE, cls_token=True)
    positions = torch.from_numpy(table).float()
    tokens = [embedded[0] + positions[0]]
    for n in range(N):
        token = embedded[1 + visible.index(n)] if n in visible else decoder.mask_token[0]
        tokens.append(token + positions[1 + n])
    x = torch.stack(tokens)[None]
    for block in decoder.blocks:
        x = block(x)
    return decoder.predict(decoder.norm(x))[0, 1:]


def test_predicting_nothing_of_normalised_patches_costs_their_variance() -> None:
    mae = method()
    torch.nn.init.zeros_(mae.student.decoder.predict.weight)
    # Targets have variance 1 with P - 1, so their mean square is (P - 1) / P.
    assert mae.loss(batch(), now()).loss.item() == pytest.approx((VALUES - 1) / VALUES, abs=1e-4)


@pytest.mark.parametrize("side", [1, 2, 7])
def test_position_embeddings_are_the_references(side: int) -> None:
    theirs = get_2d_sine_cosine_positional_embedding(32, side, cls_token=False)
    torch.testing.assert_close(sincos_positions(side, 32), torch.from_numpy(theirs).float(), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------- what is seen


def test_pixels_of_hidden_patches_do_not_change_what_the_encoder_gives() -> None:
    mae, crops, hidden = method(), batch().global_crops[0], masks()
    visible = places(~hidden)
    before = mae.student.encode(crops, visible)
    assert torch.equal(mae.student.encode(torch.where(over(hidden), crops + 3, crops), visible), before)
    assert not torch.allclose(mae.student.encode(torch.where(over(hidden), crops, crops + 3), visible), before)


def test_the_encoder_sees_a_quarter_of_the_patches_and_the_cls_token() -> None:
    mae = method()
    seen: list[tuple[int, ...]] = []
    mae.student.backbone.vit.norm.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    mae.loss(batch(), now())
    assert seen == [(2 * B, 1 + N // 4, 24)]


def test_local_crops_are_not_used() -> None:
    mae, losses = method(), []
    for local_crops in (0, 3):
        torch.manual_seed(1)
        losses.append(mae.loss(batch(local_crops=local_crops), now()).loss.item())
    assert losses[0] == losses[1]


def test_masks_follow_torchs_seed() -> None:
    mae, losses = method(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(mae.loss(batch(), now()).loss.item())
    assert losses[0] == losses[1] != losses[2]


# ------------------------------------------------------------------------------------------------- invariants


def test_every_parameter_of_the_student_gets_a_gradient_and_none_is_held() -> None:
    mae = method()
    mae.loss(batch(), now()).loss.backward()
    assert all(parameter.grad is not None for parameter in mae.student.parameters())
    assert not list(mae.held(now()))


def test_hidden_patches_are_learned() -> None:
    mae, crops = method(), batch(local_crops=0)
    smooth = torch.linspace(-1, 1, SIZE).expand_as(crops.global_crops) * torch.randn(2, B, 3, 1, 1)
    optimizer = torch.optim.AdamW(mae.student.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        outcome = take_step(mae, optimizer, step, crops._replace(global_crops=smooth))
        losses.append(outcome.loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_neither_the_loss_nor_what_follows_a_step_changes_state() -> None:
    mae = method()
    before = state(mae)
    mae.loss(batch(), now())
    mae.after_step(now())
    assert same(state(mae), before)


def test_a_state_that_is_loaded_gives_the_same_loss() -> None:
    trained, other = method(0), method(1)
    losses = []
    other.load_state_dict(state(trained))
    for mae in (trained, other):
        torch.manual_seed(3)
        losses.append(mae.loss(batch(), now()).loss.item())
    assert losses[0] == losses[1]
    assert all(name.startswith(("student.backbone.", "student.decoder.")) for name in state(trained))


def test_features_for_evaluation_are_the_mean_of_the_patch_tokens_of_whole_images() -> None:
    mae, images = method(), batch().global_crops[0]
    encoders = mae.encoders()
    assert list(encoders) == ["student"]
    tokens = mae.student.backbone.vit.forward_features(images)
    torch.testing.assert_close(encoders["student"](images), tokens[:, 1:].mean(dim=1), atol=1e-5, rtol=1e-4)


def test_it_has_no_teacher_and_no_targets() -> None:
    outcome = method().loss(batch(), now())
    assert (outcome.targets, outcome.outputs, outcome.measures) == (None, None, {})


# ---------------------------------------------------------------------------------------------------- settings


def test_a_backbone_without_patches_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name.*method\.kind = 'mae'"):
        MAE(**DECODER).build(Backbone(name="resnet18").build(SIZE), SURROUNDINGS)


def test_a_crop_of_a_single_patch_is_refused() -> None:
    backbone = FINE.but({"patch_size": SIZE})
    with pytest.raises(ValueError, match=rf"crops\.global_crops_size = {SIZE}"):
        MAE(**DECODER).build(backbone.build(SIZE), SURROUNDINGS)


@pytest.mark.parametrize("knobs", [{"decoder_dim": 500}, {"decoder_dim": 18, "decoder_num_heads": 9}])
def test_a_decoder_whose_width_does_not_divide_names_both_knobs(knobs: dict[str, int]) -> None:
    with pytest.raises(KnobError, match=r"method\.decoder_dim = \d+: .*method\.decoder_num_heads = \d+"):
        MAE.of(knobs)


def test_the_published_decoder_is_the_default() -> None:
    backbone = FINE.but({"embed_dim": 192})
    decoder = MAE().build(backbone.build(SIZE), SURROUNDINGS).student.decoder
    assert (len(decoder.blocks), decoder.embed.out_features, decoder.blocks[0].attn.num_heads) == (8, 512, 16)
    assert decoder.norm.eps == decoder.blocks[0].norm1.eps == 1e-6
    bound = math.sqrt(6 / (512 + 192))  # Xavier's
    assert 0.95 * bound < decoder.embed.weight.abs().max() <= bound
