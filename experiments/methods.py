"""What do other ways of training learn from the same images, with the same backbone, crops and steps?

Expect: labels give most; of the methods without labels DINO is ahead of SwAV, BYOL and MoCo-v2 in k-NN (paper, Tables 2
and 7). The paper has no masked methods; their features are known to be weak in k-NN before they are fine-tuned (MAE,
arXiv:2111.06377). They look at global crops alone, and so are given no others. Distillation follows the supervised
trial of the same seed, and needs as long again.

Command: dino-lab run methods
Cost: 24 trials on shapes_cpu, about 12 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Like, TrialOf
from experiments.arms import BYOL, MOCO, NO_MULTICROP, SWAV

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "method",
            {
                "dino": {},
                "supervised": {"method.kind": "supervised"},
                "distillation": {"method.kind": "distillation", "method.checkpoint": TrialOf("supervised")},
                "byol": BYOL,
                "moco_v2": MOCO,
                "swav": SWAV,
                "mae": {
                    "method.kind": "mae",
                    # Of ImageNet's head and ViT-S this is 512 and 8, MAE's own.
                    "method.decoder_dim": Like("method.head.bottleneck_dim", times=2),
                    "method.decoder_depth": Like("backbone.depth", times=2 / 3),
                    **NO_MULTICROP,
                },
                "masked": {"method.kind": "masked", **NO_MULTICROP},
            },
        )
    ],
    seeds=[0, 1, 2],
)
