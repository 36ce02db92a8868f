"""Why cross-entropy of softmaxes, and not L2 or a dot product?

Expect: L2 (MSE) is worse by 20 points of k-NN with centring and all else the same (paper, Table 7); InfoNCE, which has
no centre, stands between (Table 14). A dot product of normalised outputs is L2 up to scale and a constant, which AdamW
forgets but for its epsilon: expect the same as L2. Neither has temperatures, so there is no sharpening.

Command: dino-lab run similarity
Cost: 12 trials on shapes_cpu, about 6 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "similarity",
            {
                "cross-entropy": {"method.loss.kind": "cross_entropy"},
                "L2": {"method.loss.kind": "mse"},
                "dot product": {"method.loss.kind": "cosine"},
                "InfoNCE": {"method.loss.kind": "info_nce", "method.operation.kind": "none"},
            },
        )
    ],
    seeds=[0, 1, 2],
)
