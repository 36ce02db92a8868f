"""Whom do local crops help?

Expect: DINO, MoCo-v2 and SwAV gain three to five points of k-NN, BYOL loses seven (paper, Appendix E).

Command: dino-lab run multicrop_by_framework
Cost: 24 trials on shapes_cpu, about 12 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis
from experiments.arms import BYOL, MOCO, NO_MULTICROP, SWAV

# The labels are the paper's, whose crops are of 224 and 96 pixels; here they are as the baseline has them.
ABLATION = Ablation.grid(
    axes=[
        Axis(
            "framework",
            {
                f"{name},{crops}": {**method, **changes}
                for name, method in {"dino": {}, "byol": BYOL, "moco_v2": MOCO, "swav": SWAV}.items()
                for crops, changes in {"2x224+6x96": {}, "2x224": NO_MULTICROP}.items()
            },
        )
    ],
    seeds=[0, 1, 2],
    published="multicrop_by_framework",
)
