"""What does longer training buy?

Expect: more, up to 800 epochs on ImageNet (paper, Appendix D). Schedules are stretched, warm-ups are not. Each level is
a multiple of the baseline's epochs, 100 in the paper's vanilla recipe.

Command: dino-lab run epochs
Cost: 9 trials on shapes_cpu, about 18 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis.times("epochs", {"x1": 1.0, "x3": 3.0, "x8": 8.0})],
    seeds=[0, 1, 2],
    published="epochs",
    paper_rows={"x1": "100", "x3": "300", "x8": "800"},
)
