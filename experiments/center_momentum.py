"""How slowly may the centre follow the teacher's logits?

Expect: anything from 0 to 0.99 does, at 0.999 training collapses (paper, Appendix D).

Command: dino-lab run center_momentum
Cost: 12 trials on shapes_cpu, about 6 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "center_momentum",
            {f"{value:g}": {"method.operation.center_momentum": value} for value in (0.9, 0.0, 0.99, 0.999)},
        )
    ],
    seeds=[0, 1, 2],
    published="center_momentum",
)
