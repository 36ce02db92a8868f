"""What does longer training buy?

Expect: more, up to 800 epochs on ImageNet (paper, Appendix D). Schedules are stretched, warm-ups are not. Each level is
a multiple of the baseline's epochs, 100 in the paper's vanilla recipe.

Command: dino-lab run epochs
Cost: 9 trials on shapes_cpu, about 18 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Like

LEVELS = {f"x{times:g}": {"epochs": Like("epochs", times=times)} for times in (1.0, 3.0, 8.0)}
ABLATION = Ablation.grid(
    axes=[Axis("epochs", LEVELS)], seeds=[0, 1, 2], published="epochs", arms={"x1": "100", "x3": "300", "x8": "800"}
)
