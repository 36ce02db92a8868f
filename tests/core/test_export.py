"""What is exported must be the trial's own networks to those who load it: timm, and the reference's code."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from dino_lab.core.data.crops import whole
from dino_lab.core.export import export
from dino_lab.core.methods.method import Surroundings
from dino_lab.core.networks.weights import load_weights, read_weights
from dino_lab.core.trainer import CHECKPOINT, train
from dino_lab.core.trial import Trial
from experiments.baselines import BASELINES

SIZES = [16, 24]  # smoke's global crops, and another


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, Path]:
    """A finished trial with all that a checkpoint of DINO may hold, and its checkpoint."""
    trial = BASELINES["smoke"].but({"epochs": 2, "method.predictor.kind": "mlp", "method.head.norm_last_layer": False})
    workdir = tmp_path_factory.mktemp("trial")
    for _ in train(trial, workdir=workdir):
        pass
    return trial, workdir / CHECKPOINT


def images(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def method_of(trial: Trial, checkpoint: Path | None = None) -> Any:
    """The trial's method, with the weights of a checkpoint, or with weights that no start gives."""
    torch.manual_seed(2)
    backbone = trial.backbone.build(trial.crops.global_crops_size)
    surroundings = Surroundings(5, image_size=trial.crops.global_crops_size, global_crops_number=2, trials_dir=Path())
    method: Any = trial.method.build(backbone, surroundings)
    if checkpoint:
        method.load_state_dict(torch.load(checkpoint, weights_only=True)["method"])
    else:
        for value in method.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand_like(value))
    return method.eval()


def checkpoint_of(trial: Trial, method: nn.Module, path: Path, *, step: int = 12) -> Path:
    """As the trainer writes it."""
    state = {"trial": trial.identity, "step": step, "epoch": step // 4, "method": method.state_dict()}
    state |= {"optimizer": {}, "verdict": {}}
    torch.save(state, path)
    return path


def features(encoder: nn.Module, size: int) -> Tensor:
    with torch.no_grad():
        return encoder(images(size))  # type: ignore[no-any-return]


def read_back(trial: Trial, path: Path, *, role: Any = None) -> nn.Module:
    """The lab's own backbone with the weights of an exported file."""
    backbone = trial.backbone.build(trial.crops.global_crops_size).eval()
    load_weights(backbone, read_weights(path, role=role).backbone, source=path)
    return backbone


# ---------------------------------------------------------------------------------------------------------- timm


def test_timm_loads_the_teacher_and_gives_its_features(trained: tuple[Trial, Path], tmp_path: Path) -> None:
    trial, checkpoint = trained
    written = export(trial, checkpoint, tmp_path / "a folder", form="timm")
    assert written == [tmp_path / "a folder" / "config.json", tmp_path / "a folder" / "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'a folder'}", pretrained=True, num_classes=0).eval()
    teacher = method_of(trial, checkpoint).teacher.network.backbone
    close(theirs.forward_features(images(16))[:, 0], features(teacher, 16))
    close(features(theirs, 16), features(teacher, 16))


@pytest.mark.parametrize("size", SIZES)
def test_what_timm_is_given_is_the_teacher_at_any_crop_size(
    trained: tuple[Trial, Path], size: int, tmp_path: Path
) -> None:
    trial, checkpoint = trained
    _, weights = export(trial, checkpoint, tmp_path / "folder", form="timm")
    teacher, student = method_of(trial, checkpoint).encoders().values()
    close(features(read_back(trial, weights), size), features(teacher, size))
    assert (features(student, size) - features(teacher, size)).abs().max() > 1e-3


def test_timm_is_told_to_make_of_an_image_what_the_lab_evaluates(trained: tuple[Trial, Path], tmp_path: Path) -> None:
    trial, checkpoint = trained
    export(trial, checkpoint, tmp_path / "folder", form="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=0)
    data = timm.data.resolve_model_data_config(theirs)
    transform = timm.data.create_transform(**data, is_training=False)
    wide = torch.randint(0, 256, (32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    made, ours = transform(Image.fromarray(wide.numpy())), whole(wide[None], 16)[0]
    # Pillow rounds to a 255th, which is 0.02 of a standard deviation; at the sides it sees what is cut off afterwards.
    torch.testing.assert_close(made[:, :, 2:-2], ours[:, :, 2:-2], rtol=0, atol=0.02)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"] == {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    assert (config["num_classes"], config["num_features"]) == (0, 24)


OTHERS = {
    "resnet18": {"backbone.name": "resnet18"},
    "xcit_nano_12_p16_224": {"backbone.name": "xcit_nano_12_p16_224", "crops.local_crops_size": 16},
    "vit_small_patch14_dinov2": {
        "backbone.name": "vit_small_patch14_dinov2",  # layer scale
        "backbone.patch_size": 8,
        "backbone.embed_dim": 24,
        "backbone.depth": 2,
        "backbone.num_heads": 3,
    },
    "vit_base_patch16_224_miil": {
        "backbone.name": "vit_base_patch16_224_miil",  # no bias of queries, keys and values
        "backbone.patch_size": 8,
        "backbone.embed_dim": 24,
        "backbone.depth": 2,
        "backbone.num_heads": 3,
    },
}
NAMES_OWN = dict.fromkeys([f"backbone.{name}" for name in ("patch_size", "embed_dim", "depth", "num_heads")])


@pytest.mark.parametrize("name", OTHERS)
def test_timm_loads_every_kind_of_backbone(smoke: Trial, name: str, tmp_path: Path) -> None:
    trial = smoke.but(NAMES_OWN | OTHERS[name])
    method = method_of(trial)
    checkpoint = checkpoint_of(trial, method, tmp_path / CHECKPOINT)
    _, weights = export(trial, checkpoint, tmp_path / "folder", form="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=0).eval()
    teacher = method.teacher.network.backbone.eval()
    close(features(theirs, 16), features(teacher, 16))
    for size in (16, 32):
        close(features(read_back(trial, weights), size), features(teacher, size))


def test_the_tag_of_a_name_is_no_part_of_the_architecture(smoke: Trial, tmp_path: Path) -> None:
    trial = smoke.but({"backbone.name": "vit_tiny_patch16_224.augreg_in21k", "backbone.patch_size": 8})
    checkpoint = checkpoint_of(trial, method_of(trial), tmp_path / CHECKPOINT)
    export(trial, checkpoint, tmp_path / "folder", form="timm")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"
    timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=0)


@pytest.mark.parametrize("kind", ["swav", "supervised"])
def test_the_student_is_exported_where_there_is_no_teacher(smoke: Trial, kind: str, tmp_path: Path) -> None:
    trial = smoke.but({"method.kind": kind})
    method = method_of(trial)
    checkpoint = checkpoint_of(trial, method, tmp_path / CHECKPOINT)
    export(trial, checkpoint, tmp_path / "folder", form="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=0).eval()
    close(features(theirs, 16), features(method.student.backbone, 16))


def test_a_distilled_student_is_exported_and_not_the_teacher_that_it_was_given(smoke: Trial, tmp_path: Path) -> None:
    supervised = smoke.but({"method.kind": "supervised"})
    given = checkpoint_of(supervised, method_of(supervised), tmp_path / "given.pt")
    trial = smoke.but({"method.kind": "distillation", "method.checkpoint": str(given)})
    method = method_of(trial)
    checkpoint = checkpoint_of(trial, method, tmp_path / CHECKPOINT)
    _, weights = export(trial, checkpoint, tmp_path / "folder", form="timm")
    close(features(read_back(trial, weights), 16), features(method.student.backbone, 16))


@pytest.mark.parametrize("kind", ["mae", "masked"])
def test_timm_gives_the_mean_of_patches_where_the_lab_judges_it(smoke: Trial, kind: str, tmp_path: Path) -> None:
    trial = smoke.but({"method.kind": kind})
    method = method_of(trial)
    checkpoint = checkpoint_of(trial, method, tmp_path / CHECKPOINT)
    export(trial, checkpoint, tmp_path / "folder", form="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=0).eval()
    judged = next(iter(method.encoders().values()))
    close(features(theirs, 16), features(judged, 16))
    close(theirs.forward_features(images(16))[:, 0], features(judged.backbone, 16))


def test_position_embeddings_that_came_from_a_larger_size_are_exported_at_it(smoke: Trial, tmp_path: Path) -> None:
    larger = smoke.but({"crops.global_crops_size": 32, "crops.local_crops_size": 16})
    method = method_of(smoke)
    load_weights(method.teacher.network.backbone, larger.backbone.build(32).state_dict(), source="it")
    checkpoint = checkpoint_of(smoke, method, tmp_path / CHECKPOINT)
    _, weights = export(smoke, checkpoint, tmp_path / "folder", form="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=0).eval()
    close(features(theirs, 32), features(method.teacher.network.backbone, 32))
    close(features(read_back(smoke, weights), 16), features(method.teacher.network.backbone, 16))


# ------------------------------------------------------------------------------------------------------ official


class OfficialHead(nn.Module):
    """DINOHead of vision_transformer.py."""

    def __init__(self, sizes: list[int], out_dim: int) -> None:
        super().__init__()
        layers = [layer for before, after in pairwise(sizes) for layer in (nn.Linear(before, after), nn.GELU())]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = weight_norm(nn.Linear(sizes[-1], out_dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1, p=2))  # type: ignore[no-any-return]


def officially_loaded(path: Path, key: str) -> dict[str, Tensor]:
    """The backbone's weights, as utils.load_pretrained_weights of the reference makes them of a checkpoint."""
    state_dict = torch.load(path, map_location="cpu", weights_only=True)[key]
    state_dict = {k.replace("module.", ""): v for k, v in state_dict.items()}
    state_dict = {k.replace("backbone.", ""): v for k, v in state_dict.items()}
    return {k: v for k, v in state_dict.items() if not k.startswith("head.")}


@pytest.fixture
def official(trained: tuple[Trial, Path], tmp_path: Path) -> Path:
    (path,) = export(*trained, tmp_path / "checkpoint.pth", form="official")
    return path


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_official_export_is_student_and_teacher_at_any_crop_size(
    trained: tuple[Trial, Path], official: Path, role: str, size: int
) -> None:
    trial, checkpoint = trained
    close(
        features(read_back(trial, official, role=role), size),
        features(method_of(trial, checkpoint).encoders()[role], size),
    )


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_references_own_code_finds_every_weight_of_a_backbone(
    trained: tuple[Trial, Path], official: Path, role: str
) -> None:
    """The reference's network has the names of timm's, from which it was made."""
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3
    ).eval()
    theirs.load_state_dict(officially_loaded(official, role), strict=True)
    close(features(theirs, 16), features(method_of(*trained).encoders()[role], 16))


@pytest.mark.parametrize(("role", "prefix"), [("student", "module.head."), ("teacher", "head.")])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_references_head_takes_the_exported_head_and_gives_its_logits(
    trained: tuple[Trial, Path], official: Path, role: str, prefix: str
) -> None:
    state = torch.load(official, weights_only=True)[role]
    theirs = OfficialHead([24, 32, 32, 16], trained[0].method.head.out_dim)
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, strict=True)
    method = method_of(*trained)
    ours = method.student if role == "student" else method.teacher.network
    x = torch.randn(5, 24)
    close(theirs(x), ours.head(x))


def test_an_official_export_has_the_references_names_and_nothing_else(
    trained: tuple[Trial, Path], official: Path
) -> None:
    state = torch.load(official, weights_only=True)
    assert state.keys() == {"student", "teacher", "epoch", "dino_loss"}
    assert state["epoch"] == 2
    kept = torch.load(trained[1], weights_only=True)["method"]
    assert torch.equal(state["dino_loss"]["center"], kept["center"][None])
    assert kept["center"].abs().max() > 0
    wholes = ("cls_token", "pos_embed", "last_layer.weight_g", "last_layer.weight_v")
    layers = ["patch_embed.proj", "norm"]
    layers += [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("norm1", "attn.qkv", "attn.proj", "norm2")]
    layers += [f"blocks.{i}.mlp.{layer}" for i in (0, 1) for layer in ("fc1", "fc2")]
    names = {f"backbone.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    names |= {f"head.mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    names |= {f"{'head' if 'last' in whole else 'backbone'}.{whole}" for whole in wholes}
    assert state["teacher"].keys() == names
    assert state["student"].keys() == {f"module.{name}" for name in names}


def test_the_epochs_of_an_unfinished_trial_are_those_that_are_done(smoke: Trial, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(smoke, method_of(smoke), tmp_path / CHECKPOINT, step=7)  # four steps an epoch
    (path,) = export(smoke, checkpoint, tmp_path / "checkpoint.pth", form="official")
    assert torch.load(path, weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    "changes",
    [{"method.head.activation": "relu"}, {"method.head.layers_number": 1}, {"method.kind": "byol"}],
)
def test_a_head_that_is_not_the_papers_is_left_out_and_a_centre_that_is_not_there(
    smoke: Trial, changes: dict[str, Any], tmp_path: Path
) -> None:
    trial = smoke.but(changes)
    checkpoint = checkpoint_of(trial, method_of(trial), tmp_path / CHECKPOINT)
    (path,) = export(trial, checkpoint, tmp_path / "checkpoint.pth", form="official")
    state = torch.load(path, weights_only=True)
    assert all(name.startswith("backbone.") for name in state["teacher"])
    assert all(name.startswith("module.backbone.") for name in state["student"])
    assert ("dino_loss" in state) is (trial.method.kind == "dino")


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", OTHERS)
def test_a_backbone_without_official_names_is_refused(smoke: Trial, name: str, tmp_path: Path) -> None:
    trial = smoke.but(NAMES_OWN | OTHERS[name])
    checkpoint = checkpoint_of(trial, method_of(trial), tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=rf"'{name}': is not one of the reference's .* in \d+ names"):
        export(trial, checkpoint, tmp_path / "checkpoint.pth", form="official")
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize("kind", ["swav", "mae"])
def test_a_method_without_a_teacher_has_no_official_layout(smoke: Trial, kind: str, tmp_path: Path) -> None:
    trial = smoke.but({"method.kind": kind})
    checkpoint = checkpoint_of(trial, method_of(trial), tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=rf"method.kind = '{kind}': has no teacher.*the timm layout takes"):
        export(trial, checkpoint, tmp_path / "checkpoint.pth", form="official")


@pytest.mark.parametrize("form", ["timm", "official"])
def test_the_checkpoint_of_another_trial_is_refused(trained: tuple[Trial, Path], form: Any, tmp_path: Path) -> None:
    trial, checkpoint = trained
    with pytest.raises(ValueError, match=rf"is of trial {trial.identity}, not of {trial.but({'seed': 1}).identity}"):
        export(trial.but({"seed": 1}), checkpoint, tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["timm", "official"])
@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_exists_is_not_written_over(
    trained: tuple[Trial, Path], form: Any, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "out")
    with pytest.raises(ValueError, match="out exists"):
        export(*trained, tmp_path / "out", form=form)
    assert not (tmp_path / "out").is_dir() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("form", ["timm", "official"])
def test_an_export_that_is_cut_short_leaves_nothing(
    trained: tuple[Trial, Path], form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", crash)
        with pytest.raises(KeyboardInterrupt):
            export(*trained, tmp_path / "out", form=form)
    assert not list(tmp_path.iterdir())
    export(*trained, tmp_path / "out", form=form)


def test_folders_above_the_target_are_made(trained: tuple[Trial, Path], tmp_path: Path) -> None:
    (path,) = export(*trained, tmp_path / "a" / "b" / "checkpoint.pth", form="official")
    assert path.is_file()
