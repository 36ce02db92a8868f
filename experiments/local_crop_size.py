"""How many pixels do local crops need?

Expect: a part of a global crop's is enough; the paper's 96 pixels beside 224 are a choice of cost, and it has no
ablation of them. Each level is a multiple of the baseline's size, whose areas of the image stay as they are.

Command: dino-lab run local_crop_size
Cost: 12 trials on shapes_cpu, about 8 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis.times("crops.local_crops_size", {"x1": 1.0, "x1/2": 0.5, "x1.5": 1.5, "x2": 2.0})],
    seeds=[0, 1, 2],
)
