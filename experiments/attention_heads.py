"""Do more attention heads help, at the same dimension?

Expect: a little, at the price of speed (paper, Appendix D). Each level is a multiple of the baseline's heads, 6 in the
paper's ViT-S.

Command: dino-lab run attention_heads
Cost: 12 trials on shapes_cpu, about 7 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis.times("backbone.num_heads", {"x1": 1.0, "x4/3": 4 / 3, "x2": 2.0, "x8/3": 8 / 3})],
    seeds=[0, 1, 2],
    published="attention_heads",
    paper_rows={"x1": "6", "x4/3": "8", "x2": "12", "x8/3": "16"},
)
