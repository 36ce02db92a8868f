"""A trial's networks in the layouts of others: a folder that timm loads, or a checkpoint as the reference writes it."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

from safetensors.torch import save_file
from torch import Tensor

from dino_lab.core.checkpoint import load, save
from dino_lab.core.data.crops import MEAN, STD
from dino_lab.core.methods import MethodSettings
from dino_lab.core.methods.mae import MAE
from dino_lab.core.methods.masked import Masked
from dino_lab.core.networks.backbone import VisionTransformer
from dino_lab.core.networks.head import BottleneckHeadSettings
from dino_lab.core.networks.weights import Weights, load_weights, weights_in
from dino_lab.core.trial import Trial

Form: TypeAlias = Literal["timm", "official"]


def export(trial: Trial, checkpoint: Path, target: Path, *, form: Form) -> list[Path]:
    """Writes the networks of a trial's checkpoint to `target`, whole or not at all, and tells the files written.

    timm: a folder with the backbone of the teacher, or of the student where there is no teacher;
    `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` gives the features that the lab judges, at
    the size of a global crop. At other sizes timm interpolates position embeddings in a way of its own.

    official: a file as main_dino.py writes it, but for its command line and optimiser: student and teacher, their
    heads where they are the paper's, and the centre where there is one. A predictor is left out, as the reference has
    none.

    Raises:
        ValueError: `target` exists, the checkpoint is another trial's, or the layout has no place for its networks.
        RuntimeError: the checkpoint cannot be read.
    """
    if target.exists():
        raise ValueError(f"{target} exists; it is not written over")
    state = load(checkpoint)
    if state.get("trial") != trial.identity:
        raise ValueError(f"checkpoint {checkpoint} is of trial {state.get('trial')}, not of {trial.identity}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as beside:
        made = Path(beside) / target.name
        if form == "timm":
            _write_timm(made, trial, weights_in(state, source=checkpoint))
        else:
            save(made, _official(trial, state, source=checkpoint))
        made.rename(target)
    return sorted(target.iterdir()) if target.is_dir() else [target]


# ---------------------------------------------------------------------------------------------------------- timm


def _write_timm(folder: Path, trial: Trial, weights: Weights) -> None:
    """Source: timm, models/_hub.py, save_for_hf and _parse_model_cfg."""
    backbone = trial.backbone.build(trial.crops.global_crops_size)
    load_weights(backbone, weights.backbone, source=f"the checkpoint of trial {trial.identity}")
    if isinstance(backbone, VisionTransformer):
        model, arguments = backbone.vit, _of_vit(backbone.vit, trial.method)
    else:
        model, arguments = backbone.model, _of_pooled(backbone.model, trial)
    size = arguments.get("img_size", trial.crops.global_crops_size)
    config = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            **{name: model.pretrained_cfg[name] for name in ("fixed_input_size", "first_conv", "classifier")},
            "input_size": [3, size, size],
            "mean": MEAN,
            "std": STD,
            # The largest square in the middle, as in `whole`.
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
    }
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _of_vit(vit: Any, method: MethodSettings) -> dict[str, Any]:
    """timm's arguments of a vision transformer; its image size is that of the position embeddings that it holds."""
    patch = vit.patch_embed.proj.kernel_size[0]
    arguments = {
        "img_size": math.isqrt(vit.pos_embed.shape[1] - 1) * patch,
        "patch_size": patch,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": vit.blocks[0].attn.num_heads,
    }
    # What trains patches is judged by their mean.
    return arguments | ({"global_pool": "avg", "fc_norm": False} if isinstance(method, MAE | Masked) else {})


def _of_pooled(model: Any, trial: Trial) -> dict[str, Any]:
    """timm's arguments of any other network: what the trial has set."""
    dimensions = trial.backbone.model_dump(include={"patch_size", "embed_dim", "depth", "num_heads"}, exclude_none=True)
    return dimensions | ({"img_size": trial.crops.global_crops_size} if hasattr(model, "patch_embed") else {})


# ------------------------------------------------------------------------------------------------------ official


def _official(trial: Trial, state: dict[str, Any], *, source: Path) -> dict[str, Any]:
    """Before the student's names is DistributedDataParallel's "module.".

    Source: main_dino.py, train_dino (save_dict).
    """
    teacher, student = weights_in(state, source=source), weights_in(state, source=source, role="student")
    if teacher.role != "teacher":
        raise ValueError(
            f"method.kind = {trial.method.kind!r}: has no teacher, and the official layout is of a student and its "
            "teacher; the timm layout takes the student's backbone"
        )
    center = {} if teacher.center is None else {"dino_loss": {"center": teacher.center[None]}}
    return {
        "student": {f"module.{name}": value for name, value in _official_network(trial, student).items()},
        "teacher": _official_network(trial, teacher),
        "epoch": state["epoch"],
        **center,
    }


def _official_network(trial: Trial, weights: Weights) -> dict[str, Tensor]:
    backbone = {name.removeprefix("vit."): value for name, value in weights.backbone.items()}
    depth = sum(name.endswith("norm1.weight") for name in backbone)
    if other := backbone.keys() ^ _official_names(depth):
        raise ValueError(
            f"backbone.name = {trial.backbone.name!r}: is not one of the reference's vision transformers, which differ "
            f"from it in {len(other)} names, {min(other)} among them; the timm layout takes it, the official does not"
        )
    head = weights.head if _is_papers(getattr(trial.method, "head", None)) else {}
    named = {"backbone": backbone, "head": head}
    return {f"{part}.{name}": value for part, values in named.items() for name, value in values.items()}


def _official_names(depth: int) -> set[str]:
    """Source: vision_transformer.py, VisionTransformer."""
    of_block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = ["patch_embed.proj", "norm", *(f"blocks.{i}.{layer}" for i in range(depth) for layer in of_block)]
    return {"cls_token", "pos_embed"} | {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def _is_papers(head: Any) -> bool:
    """Whether it is the reference's DINOHead, which names the layer of an MLP of one otherwise."""
    return isinstance(head, BottleneckHeadSettings) and head.activation == "gelu" and head.layers_number > 1
