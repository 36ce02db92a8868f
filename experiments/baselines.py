"""Baselines: whole trials that experiments start from, by name; --baseline chooses one."""

from dino_lab.core.trial import Trial

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
    "head.out_dim": 256,
    "head.hidden_dim": 256,
    "head.bottleneck_dim": 64,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": 4,
    "crops.local_crops_scale": [0.15, 0.4],
    # What the reference's crops take from colour is given back.
    "crops.hue": 0.05,
    "crops.grayscale_probability": 0.0,
    # The reference's blur, made for 224 px, would leave nothing of crops this small.
    "crops.blur_probability": [0.0, 0.0, 0.0],
    "optimizer.lr": 0.032,
    "optimizer.warmup_epochs": 1.0,
    "optimizer.freeze_last_layer_epochs": 0.2,
    # A short run has too few steps for a slow teacher, and none to spare for one that comes to a halt.
    "teacher.momentum_teacher": 0.98,
    "teacher.momentum_teacher_end": 0.98,
    "evals.every_epochs": 1,
    "evals.knn.bank_images": 2000,
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
    "head.out_dim": 32,
    "head.hidden_dim": 32,
    "head.bottleneck_dim": 16,
    "crops.global_crops_size": 16,
    "crops.local_crops_size": 8,
    "crops.local_crops_number": 2,
    "runtime.log_period_steps": 2,
    "runtime.checkpoint_period_steps": 4,
}

BASELINES = {
    # A minute on one core: what a laptop can show.
    "shapes_cpu": Trial().but(_SHAPES_CPU),
    # Seconds: everything runs, nothing is learned.
    "smoke": Trial().but(_SMOKE),
}
DEFAULT = "shapes_cpu"
