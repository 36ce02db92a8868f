"""What does longer training buy?

Expect: more, up to 800 epochs on ImageNet (paper, Appendix D). Schedules are stretched, warm-ups are not.

Command: dino-lab run epochs
Cost: 9 trials on shapes_cpu, about 7 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Like

ABLATION = Ablation.grid(
    axes=[Axis("epochs", {f"x{times:g}": {"epochs": Like("epochs", times=times)} for times in (1.0, 0.5, 2.0)})],
    seeds=[0, 1, 2],
)
