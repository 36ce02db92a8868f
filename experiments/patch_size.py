"""What do smaller patches buy, and cost?

Expect: they are better at every size of network, and cost time as the number of patches grows (paper, Figure 5).

Command: dino-lab run patch_size
Cost: 6 trials on shapes_cpu, about 8 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(axes=[Axis.times("backbone.patch_size", {"x1": 1.0, "x1/2": 0.5})], seeds=[0, 1, 2])
