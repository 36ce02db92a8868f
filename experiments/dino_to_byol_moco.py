"""What lies between DINO, MoCo-v2 and BYOL?

Expect: MSE is worse than cross-entropy; BYOL without a predictor collapses although it has batch normalisation, MSE
with centring alone does not; multi-crop helps DINO and MoCo-v2 and hurts BYOL (paper, Table 14).

Command: dino-lab run dino_to_byol_moco
Cost: 30 trials on shapes_cpu, about 16 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis
from experiments.arms import BYOL, MOCO, NO_MULTICROP, PREDICTOR

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "rows",
            {
                "row1_dino": {},
                "row2_mse": {"method.loss.kind": "mse"},
                "row3_predictor": PREDICTOR,
                "row4_no_multicrop": NO_MULTICROP,
                "row5_moco_v2": {**MOCO, **NO_MULTICROP},
                "row6_moco_v2_multicrop": MOCO,
                "row7_byol": {**BYOL, **NO_MULTICROP},
                "row8_byol_no_predictor": {
                    "method.kind": "byol",
                    "method.head.hidden_dim": BYOL["method.head.hidden_dim"],
                    "method.predictor.kind": "none",
                    **NO_MULTICROP,
                },
                "row9_mse_center_only": {"method.loss.kind": "mse", **NO_MULTICROP},
                "row10_byol_multicrop": BYOL,
            },
        )
    ],
    seeds=[0, 1, 2],
    published="dino_to_byol_moco",
)
