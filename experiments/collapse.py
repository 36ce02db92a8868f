"""Do centring and sharpening keep each other from collapse?

Expect: without centring the teacher's entropy falls to 0 (one prototype), without sharpening it rises to ln K
(uniform), and KL goes to 0 in both; with both operations neither happens (paper, Section 5.3 and Figure 7).

Command: dino-lab run collapse
Cost: 9 trials on shapes_cpu, 5 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "operations",
            {
                "both": {},
                "centring only": {"method.loss.sharpening": False},
                "sharpening only": {"method.operation.kind": "none"},
            },
        )
    ],
    seeds=[0, 1, 2],
)
