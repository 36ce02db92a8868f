"""Where should the areas of local crops end and those of global crops begin?

Expect: from 0.24 to 0.48 of the image little changes, below it is worse (paper, Appendix E): local crops from 0.05 to
s, global crops from s to 1.

Command: dino-lab run crop_scale
Cost: 15 trials on shapes_cpu, about 8 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis
from experiments import views

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "s",
            {
                str(s): {"crops.local.scale": [0.05, s], **views.of(views.GLOBAL, {"scale": [s, 1.0]})}
                for s in (0.32, 0.08, 0.16, 0.24, 0.48)
            },
        )
    ],
    seeds=[0, 1, 2],
    published="crop_scale",
)
