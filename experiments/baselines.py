"""Baselines: whole trials that experiments start from, by name; --baseline chooses one."""

from dino_lab.core.trial import Trial
from experiments import views

_SHAPES_CPU = {
    # How many steps decides what is learned: small batches give most for a minute of one core.
    "epochs": 2,
    "batch_size": 16,
    "backbone.name": "vit_tiny_patch16_224",
    "backbone.patch_size": 8,
    "backbone.embed_dim": 96,
    "backbone.depth": 3,
    "backbone.num_heads": 3,
    "backbone.drop_path_rate": 0.0,
    # The reference's head would hold seven of eight million parameters of a network this small.
    "method.head.out_dim": 256,
    "method.head.hidden_dim": 256,
    "method.head.bottleneck_dim": 64,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": 4,
    "crops.local.scale": [0.15, 0.4],
    # What the reference's crops take from colour is given back.
    **views.of(views.ALL, {"hue": 0.05, "grayscale_probability": 0.0}),
    # The reference's blur, made for 224 px, would leave nothing of crops this small; where it is turned on again, it
    # is as strong relative to the crop.
    **views.of(views.ALL, {"blur_probability": 0.0, "blur_sigma": [0.1, 0.3]}),
    "optimizer.lr": 0.032,
    "optimizer.warmup_epochs": 1.0,
    "method.head.freeze_last_layer_epochs": 0.2,
    # A short run has too few steps for a slow teacher, and none to spare for one that comes to a halt.
    "method.teacher.momentum_teacher": 0.98,
    "method.teacher.momentum_teacher_end": 0.98,
    "evals.every_epochs": 1,
    "evals.bank_images": 2000,
    "runtime.log_period_steps": 10,
    "runtime.checkpoint_period_steps": 50,
}

_SMOKE = _SHAPES_CPU | {
    "epochs": 3,
    "batch_size": 8,
    "data.train_images": 32,
    "data.test_images": 24,
    "data.image_size": 32,
    "backbone.patch_size": 8,
    "backbone.embed_dim": 24,
    "backbone.depth": 2,
    "method.head.out_dim": 128,
    "method.head.hidden_dim": 32,
    "method.head.bottleneck_dim": 16,
    "crops.global_crops_size": 16,
    "crops.local_crops_size": 8,
    "crops.local_crops_number": 2,
    "runtime.log_period_steps": 2,
    "runtime.checkpoint_period_steps": 4,
}

# The reference's defaults are the lab's own, and its example for a single node of 8 GPUs with 64 images each is them:
# main_dino.py, README.md "Vanilla DINO training". Its batch is that of all GPUs.
_IMAGENET = {
    "data.kind": "imagefolder",
    "data.root": "imagenet",
    # Crops are of whole photographs, as the reference's.
    "data.image_size": None,
    "batch_size": 512,
    # As many parts as the reference has GPUs.
    "accumulation_steps": 8,
    "precision": "bf16",
    "runtime.device": "cuda",
    "runtime.gpus": 1.0,
    "runtime.cpus": 11,
    "runtime.loader_workers": 10,
}

# vision_transformer.py, vit_small.
_IMAGENET_VITS16 = _IMAGENET | {
    "backbone.name": "vit_small_patch16_224",
    "backbone.patch_size": 16,
    "backbone.embed_dim": 384,
    "backbone.depth": 12,
    "backbone.num_heads": 6,
}

# README.md, "Boosting DINO performance": 2 nodes of 8 GPUs with 64 images each.
_IMAGENET_VITS16_300 = _IMAGENET_VITS16 | {
    "epochs": 300,
    "batch_size": 1024,
    "accumulation_steps": 16,
    "method.loss.teacher_temp": 0.07,
    "method.loss.warmup_teacher_temp_epochs": 30,
    "method.head.norm_last_layer": False,
}

# "vits8" of run.py of github.com/mehdidc/dino: 16 images a GPU. It names no source; its values for two other models are
# those of the authors' args.txt (see below). The number of GPUs is not among them; 64 make the paper's batch of 1024
# (section 3.2).
_IMAGENET_VITS8 = _IMAGENET_VITS16_300 | {
    "backbone.patch_size": 8,
    "epochs": 800,
    "accumulation_steps": 64,
    "precision": "f32",
    "crops.local_crops_number": 10,
}

# dino_vitbase16_pretrain/args.txt as quoted, alike, there and in other_tasks/DINO/README.md of
# github.com/jiachenzhu/DyT: 4 nodes of 8 GPUs with 32 images each.
_IMAGENET_VITB16 = _IMAGENET_VITS16_300 | {
    "backbone.name": "vit_base_patch16_224",
    "backbone.embed_dim": 768,
    "backbone.num_heads": 12,
    "epochs": 400,
    "accumulation_steps": 32,
    "precision": "f32",
    "method.loss.warmup_teacher_temp_epochs": 50,
    "method.head.norm_last_layer": True,
    "method.head.freeze_last_layer_epochs": 3.0,
    "optimizer.lr": 0.00075,
    "optimizer.min_lr": 2e-6,
    "optimizer.clip_grad": 0.3,
    **views.of(views.GLOBAL, {"scale": [0.25, 1.0]}),
    "crops.local.scale": [0.05, 0.25],
    "crops.local_crops_number": 10,
}

_CIFAR10_VIT_TINY = {
    "data.kind": "imagefolder",
    "data.root": "cifar10",
    "data.test_folder": "test",
    "data.image_size": 32,
    "epochs": 200,
    "batch_size": 256,
    "backbone.name": "vit_tiny_patch16_224",
    "backbone.patch_size": 4,
    "backbone.embed_dim": 192,
    "backbone.depth": 12,
    "backbone.num_heads": 3,
    "method.head.out_dim": 4096,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": 6,
    # As strong relative to the crop as the reference's 2 pixels to 224.
    **views.of(views.ALL, {"blur_sigma": [0.1, 0.3]}),
    "runtime.device": "cuda",
    "runtime.gpus": 1.0,
}

BASELINES = {
    # A minute on one core: what a laptop can show.
    "shapes_cpu": Trial().but(_SHAPES_CPU),
    # Seconds: everything runs, nothing is learned.
    "smoke": Trial().but(_SMOKE),
    # Not the paper's: its recipe on the reference's terms for 32 pixels. Hours on one GPU.
    "cifar10_vit_tiny": Trial().but(_CIFAR10_VIT_TINY),
    # k-NN 69.3, linear 73.8 (README.md); 1.75 days on 8 GPUs.
    "imagenet_vits16": Trial().but(_IMAGENET_VITS16),
    # k-NN 73.3, linear 76.1 (README.md); 2.6 days on 16 GPUs.
    "imagenet_vits16_300": Trial().but(_IMAGENET_VITS16_300),
    # k-NN 78.3, linear 79.7 (README.md).
    "imagenet_vits8": Trial().but(_IMAGENET_VITS8),
    # k-NN 76.1, linear 78.2 (README.md).
    "imagenet_vitb16": Trial().but(_IMAGENET_VITB16),
    # README.md, "ResNet-50 and other convnets trainings" (its lr as quoted in dino#145): 100 epochs on 8 GPUs.
    # Batch normalisation sees a part of the batch here and all of it there; timm starts its last one in a block at 0.
    "imagenet_resnet50": Trial().but(
        _IMAGENET
        | {
            "backbone.name": "resnet50",
            "backbone.drop_path_rate": 0.0,
            "optimizer.kind": "sgd",
            "optimizer.lr": 0.03,
            "optimizer.weight_decay": 1e-4,
            "optimizer.weight_decay_end": 1e-4,
            **views.of(views.GLOBAL, {"scale": [0.14, 1.0]}),
            "crops.local.scale": [0.05, 0.14],
        }
    ),
}
DEFAULT = "shapes_cpu"
