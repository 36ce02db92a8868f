"""Which components does DINO need?

Expect: without momentum it collapses; MSE costs 20 points, no multi-crop 5; Sinkhorn-Knopp and a predictor change
little; BYOL, MoCo-v2 and SwAV are behind (paper, Table 7).

Command: dino-lab run components
Cost: 27 trials on shapes_cpu, about 15 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis
from experiments.arms import BYOL, MOCO, NO_MULTICROP, PREDICTOR, SWAV

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "components",
            {
                "dino": {},
                "no_momentum": {"method.teacher.kind": "student_copy"},
                "sinkhorn": {"method.operation.kind": "sinkhorn"},
                "no_multicrop": NO_MULTICROP,
                "mse": {"method.loss.kind": "mse"},
                "predictor": PREDICTOR,
                "byol": {**BYOL, **NO_MULTICROP},
                "moco_v2": {**MOCO, **NO_MULTICROP},
                "swav": SWAV,
            },
        )
    ],
    seeds=[0, 1, 2],
    published="components",
)
