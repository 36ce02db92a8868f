"""What does DINO learn where colour or background predicts the class?

Expect: no label is seen, so colour is learned wherever crops keep it, and k-NN then takes neighbours of the same
colour: the more colour predicts the shape among them, the more it misleads where it does not, in the test split. An
augmentation that removes colour (grayscale) should save it. The paper has no such table.

Command: dino-lab run color_bias
Cost: 30 trials on shapes_cpu, about 18 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis
from experiments import views

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "predicts",
            {
                "nothing": {},
                "colour 0.9": {"data.color_predicts_class": 0.9},
                "colour 1": {"data.color_predicts_class": 1.0},
                "background 0.9": {"data.background_predicts_class": 0.9},
                "background 1": {"data.background_predicts_class": 1.0},
            },
        ),
        Axis("crops", {"as they are": {}, "gray": views.of(views.ALL, {"grayscale_probability": 1.0})}),
    ],
    seeds=[0, 1, 2],
    fixed={"data.kind": "shapes", "data.class_factor": "shape"},
)
