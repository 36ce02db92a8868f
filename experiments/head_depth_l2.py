"""How deep must the head be, and what does its l2-normalised bottleneck do?

Expect: with the bottleneck deeper is better; without it three and more layers collapse (paper, Appendix C). Layers are
all linear ones, the last included; without the bottleneck they are a plain MLP to the K logits.

Command: dino-lab run head_depth_l2
Cost: 21 trials on shapes_cpu, about 11 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

LEVELS: dict[str, dict[str, str | int]] = {
    f"layers={layers},l2_bottleneck=yes": {"method.head.layers_number": layers - 1} for layers in (4, 2, 3)
}
LEVELS |= {
    f"layers={layers},l2_bottleneck=no": {"method.head.kind": "mlp", "method.head.layers_number": layers}
    for layers in (1, 2, 3, 4)
}

ABLATION = Ablation.grid(axes=[Axis("head", LEVELS)], seeds=[0, 1, 2], published="head_depth_l2")
