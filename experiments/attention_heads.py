"""Do more attention heads help, at the same dimension?

Expect: a little, at the price of speed (paper, Appendix D).

Command: dino-lab run attention_heads
Cost: 12 trials on shapes_cpu, about 7 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis.over("backbone.num_heads", [3, 1, 6, 12])], seeds=[0, 1, 2], published="attention_heads"
)
