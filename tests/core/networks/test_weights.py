"""Files of the lab, of the reference and of timm, read into the lab's networks, must give their writers' features."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.networks.head import BottleneckHeadSettings, MLPPredictor
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import Frozen, Teacher
from dino_lab.core.networks.weights import find_checkpoint, load_weights, read_network, read_weights
from dino_lab.core.schedules import Now

PATCH, DIM, DEPTH, HEADS, K = 8, 24, 3, 3, 32
BACKBONE = Backbone(
    name="vit_tiny_patch16_224", patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, drop_path_rate=0.0
)
HEAD = BottleneckHeadSettings(out_dim=K, hidden_dim=20, bottleneck_dim=16)


def network(image_size: int = 32) -> Network:
    torch.manual_seed(1)
    return Network(BACKBONE.build(image_size), HEAD.build(DIM)).eval()


def images(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------- the reference: names, shapes and forward


def official_backbone(seed: int, *, image_size: int = 32) -> dict[str, Tensor]:
    """Every weight of a small network of vision_transformer.py, drawn."""
    shapes = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 1 + (image_size // PATCH) ** 2, DIM),
        "patch_embed.proj.weight": (DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (DIM,),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
    }
    for block in range(DEPTH):
        for layer, (out, into) in {
            "attn.qkv": (3 * DIM, DIM),
            "attn.proj": (DIM, DIM),
            "mlp.fc1": (4 * DIM, DIM),
            "mlp.fc2": (DIM, 4 * DIM),
        }.items():
            shapes[f"blocks.{block}.{layer}.weight"] = (out, into)
            shapes[f"blocks.{block}.{layer}.bias"] = (out,)
        for layer in ("norm1", "norm2"):
            shapes[f"blocks.{block}.{layer}.weight"] = shapes[f"blocks.{block}.{layer}.bias"] = (DIM,)
    return drawn(shapes, seed)


def official_head(seed: int) -> dict[str, Tensor]:
    widths = {"mlp.0": (20, DIM), "mlp.2": (20, 20), "mlp.4": (16, 20)}
    shapes = {f"{layer}.{part}": size for layer, size in widths.items() for part, size in parts(size)}
    return drawn(shapes | {"last_layer.weight_g": (K, 1), "last_layer.weight_v": (K, 16)}, seed + 100)


def parts(size: tuple[int, int]) -> list[tuple[str, tuple[int, ...]]]:
    return [("weight", size), ("bias", size[:1])]


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def official_features(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The forward of vision_transformer.py with these weights: the CLS token after the last norm."""
    size = x.shape[-1]
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + official_position(w["pos_embed"], size)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    for i in range(DEPTH):
        b, n, c = x.shape
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (c // HEADS) ** -0.5).softmax(dim=-1)
        x = x + linear(f"blocks.{i}.attn.proj", (attention @ v).transpose(1, 2).reshape(b, n, c))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
    return norm("norm", x)[:, 0]


def official_position(pos_embed: Tensor, size: int) -> Tensor:
    """interpolate_pos_encoding, of a square image."""
    number = pos_embed.shape[1] - 1
    side = int(math.sqrt(number))
    if (size // PATCH) ** 2 == number:
        return pos_embed
    grid = pos_embed[:, 1:].reshape(1, side, side, DIM).permute(0, 3, 1, 2)
    scale = (size // PATCH + 0.1) / side
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, DIM)], dim=1)


def official_logits(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The forward of DINOHead, with weight norm written out."""
    x = F.gelu(F.linear(x, w["mlp.0.weight"], w["mlp.0.bias"]))
    x = F.gelu(F.linear(x, w["mlp.2.weight"], w["mlp.2.bias"]))
    x = F.normalize(F.linear(x, w["mlp.4.weight"], w["mlp.4.bias"]), dim=-1)
    v = w["last_layer.weight_v"]
    return x @ (w["last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)).T


def official_checkpoint(path: Path, *, image_size: int = 32, teacher_wrapped: bool = False) -> Path:
    """As main_dino.py saves it: student of seed 0, teacher of seed 1, and everything that the lab has no use for."""

    def saved(seed: int, prefix: str) -> dict[str, Tensor]:
        backbone = {f"{prefix}backbone.{n}": v for n, v in official_backbone(seed, image_size=image_size).items()}
        return backbone | {f"{prefix}head.{n}": v for n, v in official_head(seed).items()}

    state = {
        "student": saved(0, "module."),
        "teacher": saved(1, "module." if teacher_wrapped else ""),
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, use_fp16=True, local_crops_scale=(0.05, 0.4), gpu=0),
        "dino_loss": {"center": torch.linspace(-1, 1, K)[None]},
        "fp16_scaler": {"scale": 65536.0},
    }
    torch.save(state, path)
    return path


@pytest.mark.parametrize(("role", "seed"), [(None, 1), ("teacher", 1), ("student", 0)])
@pytest.mark.parametrize("crop_size", [32, 16, 24, 48])
@pytest.mark.parametrize("built_for", [32, 16, 48])
def test_an_official_checkpoint_gives_the_references_features_and_logits_at_any_size(
    role: Any, seed: int, crop_size: int, built_for: int, tmp_path: Path
) -> None:
    weights = read_weights(official_checkpoint(tmp_path / "checkpoint.pth"), role=role)
    ours = network(built_for)
    load_weights(ours, weights.network, source="it")
    features = official_features(official_backbone(seed), images(crop_size))
    close(ours.backbone(images(crop_size)), features)
    close(ours.head(features), official_logits(official_head(seed), features))
    assert weights.role == role or (role is None and weights.role == "teacher")


def test_a_teacher_that_the_reference_wrapped_for_its_batch_normalisation_is_read_alike(tmp_path: Path) -> None:
    plain = read_weights(official_checkpoint(tmp_path / "plain.pth"))
    wrapped = read_weights(official_checkpoint(tmp_path / "wrapped.pth", teacher_wrapped=True))
    assert plain.network.keys() == wrapped.network.keys()
    assert all(torch.equal(value, wrapped.network[name]) for name, value in plain.network.items())


def test_the_centre_of_an_official_checkpoint_is_read_as_the_lab_keeps_it(tmp_path: Path) -> None:
    center = read_weights(official_checkpoint(tmp_path / "checkpoint.pth")).center
    assert center is not None
    assert torch.equal(center, torch.linspace(-1, 1, K))


def test_a_frozen_teacher_is_the_teacher_of_an_official_checkpoint_and_stays_it(tmp_path: Path) -> None:
    path = official_checkpoint(tmp_path / "checkpoint.pth")
    student = network()
    teacher: Teacher = Frozen(checkpoint=str(path)).build(student, trials_dir=tmp_path)
    teacher.follow(student, Now(0, steps=2, steps_per_epoch=1, measured=False))
    crops = torch.stack([images(32), images(32).flip(-1)])
    logits, features = teacher([crops])
    for crop, found in enumerate(features):
        close(found, official_features(official_backbone(1), crops[crop]))
        close(logits[crop], official_logits(official_head(1), found))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# ----------------------------------------------------------------------------------------------- a backbone alone


def saved_as(suffix: str) -> Callable[[dict[str, Tensor], Path], Path]:
    def save(weights: dict[str, Tensor], folder: Path) -> Path:
        path = folder / f"weights{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(weights, path)
        return path

    return save


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("crop_size", [32, 16])
@pytest.mark.parametrize("role", [None, "student", "teacher"])
def test_the_official_backbone_alone_gives_the_references_features(
    suffix: str, crop_size: int, role: Any, tmp_path: Path
) -> None:
    path = saved_as(suffix)(official_backbone(5), tmp_path)
    weights = read_weights(path, role=role)
    assert (weights.head, weights.center, weights.role) == ({}, None, None)
    ours = BACKBONE.build(16).eval()
    load_weights(ours, weights.backbone, source=path)
    close(ours(images(crop_size)), official_features(official_backbone(5), images(crop_size)))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}),
        ("vit_small_patch14_dinov2", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}),
        ("xcit_nano_12_p16_224", {}),
        ("resnet18", {}),
    ],
)
def test_timms_own_weights_give_timms_own_features(
    suffix: str, name: str, knobs: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    size = {} if name == "resnet18" else {"img_size": 32}
    theirs = timm.create_model(name, num_classes=0, **size, **knobs).eval()
    for value in theirs.state_dict().values():
        if value.is_floating_point():
            value.add_(0.05 * torch.rand_like(value))  # nothing is 0 or 1 by its start, and no variance negative
    path = saved_as(suffix)(theirs.state_dict(), tmp_path)
    ours = Backbone(name=name, drop_path_rate=0.0, **knobs).build(32).eval()
    load_weights(ours, read_weights(path).backbone, source=path)
    close(ours(images(32)), theirs(images(32)))


def test_the_names_of_the_smallest_published_network_fit(tmp_path: Path) -> None:
    """ViT-S/16, of which the reference publishes the backbone; the names and sizes that timm has for it."""
    theirs = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0)
    path = saved_as(".pth")(theirs.state_dict(), tmp_path)
    ours = Backbone().build(96)
    load_weights(ours, read_weights(path).backbone, source=path)
    assert ours.vit.pos_embed.shape == (1, 197, 384)


# ------------------------------------------------------------------------------------------------- the lab's own


def labs_checkpoint(path: Path, method: nn.Module) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"trial": "abc", "step": 3, "method": method.state_dict(), "optimizer": {}, "verdict": {}}, path)
    return path


class WithTeacher(nn.Module):
    """What the state of a method is made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.student = Network(BACKBONE.build(32), HEAD.build(DIM), MLPPredictor(hidden_dim=8).build(16))
        self.teacher = Teacher(self.student)
        for parameter in self.teacher.parameters():
            parameter.mul_(1.5)
        self.register_buffer("center", torch.arange(3.0))


class WithoutTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = network()


def assert_same(weights: dict[str, Tensor], module: nn.Module) -> None:
    assert weights.keys() == module.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_the_teacher_of_a_trial_is_read_by_the_trials_id_and_by_its_file(tmp_path: Path) -> None:
    method = WithTeacher()
    path = labs_checkpoint(tmp_path / "abc" / "checkpoint.pt", method)
    assert_same(read_network("abc", tmp_path), method.teacher.network)
    assert_same(read_network(str(path), tmp_path / "elsewhere"), method.teacher.network)
    weights = read_weights(path)
    assert weights.role == "teacher"
    assert weights.center is not None
    assert weights.center.tolist() == [0, 1, 2]


def test_the_student_of_a_trial_is_read_without_its_predictor(tmp_path: Path) -> None:
    method = WithTeacher()
    weights = read_weights(labs_checkpoint(tmp_path / "checkpoint.pt", method), role="student")
    assert_same(weights.network, Network(method.student.backbone, method.student.head))


def test_the_student_stands_in_where_a_trial_has_no_teacher(tmp_path: Path) -> None:
    method = WithoutTeacher()
    weights = read_weights(labs_checkpoint(tmp_path / "checkpoint.pt", method))
    assert_same(weights.network, method.student)
    assert (weights.role, weights.center) == ("student", None)


@pytest.mark.parametrize("crop_size", [48, 16])
def test_a_network_of_another_image_size_of_the_lab_keeps_its_features(crop_size: int, tmp_path: Path) -> None:
    method = WithoutTeacher()
    path = labs_checkpoint(tmp_path / "checkpoint.pt", method)
    other = network(48)
    load_weights(other, read_weights(path).network, source=path)
    close(other.backbone(images(crop_size)), method.student.backbone(images(crop_size)))


def test_position_embeddings_of_another_size_keep_what_the_optimiser_may_do() -> None:
    for trained in (True, False):
        backbone = BACKBONE.build(16).requires_grad_(trained)
        load_weights(backbone, BACKBONE.build(32).state_dict(), source="it")
        assert backbone.vit.pos_embed.shape == (1, 17, DIM)
        assert backbone.vit.pos_embed.requires_grad is trained


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_name_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint 'abc': neither a file nor a trial"):
        find_checkpoint("abc", tmp_path)


def test_a_checkpoint_without_a_teacher_is_refused_where_the_teacher_is_asked_for(tmp_path: Path) -> None:
    path = labs_checkpoint(tmp_path / "checkpoint.pt", WithoutTeacher())
    with pytest.raises(ValueError, match=r"checkpoint\.pt: has no teacher; expected names that begin with 'backbone"):
        read_weights(path, role="teacher")


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"model": {"a": torch.zeros(1)}, "epoch": 3}, "holds epoch, model"),
        ({}, "holds nothing"),
        ([torch.zeros(1)], "holds a list"),
        ({"teacher": {"encoder.weight": torch.zeros(1)}}, "has no teacher and no student"),
    ],
)
def test_a_file_of_none_of_the_layouts_is_refused_by_name_and_what_it_holds(
    state: Any, found: str, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other\.pth: {found}.*; expected"):
        read_weights(tmp_path / "other.pth")


def refusal(weights: dict[str, Tensor]) -> str:
    """What is said of weights that a small network does not take; nothing of it may have been loaded."""
    ours = network()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"^some\.pth is of another network: it ") as caught:
        load_weights(ours, weights, source="some.pth")
    assert_same(before, ours)
    return str(caught.value)


def test_names_and_shapes_of_another_network_are_refused_in_one_message_and_nothing_is_loaded() -> None:
    weights = network().state_dict()
    del weights["head.last_layer.weight_v"]
    weights["backbone.vit.blocks.0.ls1.gamma"] = torch.ones(DIM)
    weights["head.mlp.4.bias"] = torch.ones(7)
    weights["backbone.vit.pos_embed"] = torch.ones(1, 12, DIM)  # 11 patches are no square
    said = refusal(weights)
    assert "lacks head.last_layer.weight_v;" in said
    assert "backbone.vit.blocks.0.ls1.gamma" in said
    assert "head.mlp.4.bias [7] for [16]" in said
    assert "backbone.vit.pos_embed [1, 12, 24] for [1, 17, 24]" in said


@pytest.mark.parametrize("shape", [(1, 10, DIM + 1), (2, 10, DIM), (10, DIM), (1, 10, DIM, 1)])
def test_position_embeddings_that_are_not_a_square_of_the_networks_own_are_refused(shape: tuple[int, ...]) -> None:
    weights = network().state_dict() | {"backbone.vit.pos_embed": torch.ones(shape)}
    assert "backbone.vit.pos_embed" in refusal(weights)


def test_a_deeper_network_is_refused_with_a_few_of_its_names_and_their_number() -> None:
    deeper = Network(BACKBONE.but({"depth": DEPTH + 1}).build(32), HEAD.build(DIM))
    assert "backbone.vit.blocks.3.attn.proj.bias" in refusal(deeper.state_dict())
    assert "and 8 more" in refusal(deeper.state_dict())


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_file_that_cannot_be_read_is_a_runtime_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(RuntimeError, match=rf"{name} cannot be read"):
        read_weights(tmp_path / name)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def test_reading_runs_no_code_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"teacher": official_backbone(0), "args": argparse.Namespace(arch=Evil())}
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(RuntimeError, match="cannot be read"):
        read_weights(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "evil").exists()
