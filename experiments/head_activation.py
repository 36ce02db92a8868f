"""GELU or ReLU in the head?

Expect: GELU is a little better, as in the backbone (paper, Appendix C).

Command: dino-lab run head_activation
Cost: 6 trials on shapes_cpu, about 3 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis.over("method.head.activation", ["gelu", "relu"])],
    seeds=[0, 1, 2],
    published="head_activation",
)
