"""How many pixels do local crops need?

Expect: those of the baseline are enough: the paper's 96 beside 224 are a choice of cost, of which it has no ablation.
Each level is a multiple of the baseline's size; the areas that local crops show of an image stay as they are.

Command: dino-lab run local_crop_size
Cost: 9 trials on shapes_cpu, about 8 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis.times("crops.local_crops_size", {"x1": 1.0, "x2": 2.0, "x3": 3.0})],
    seeds=[0, 1, 2],
)
