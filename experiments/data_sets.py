"""Does what is learned on one data set tell the images of another apart?

Expect: less well than what is learned on its own images, and better than an untrained network; the paper pretrains
on other data for retrieval (Table 3) and has no such table. Digits are a third as many as shapes, so three times the
epochs make as many steps.

Command: dino-lab run data_sets
Cost: 12 trials on shapes_cpu, about 7 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Changes, Like
from experiments.data_size import IN_EPOCHS

ON_DIGITS: Changes = {
    "data.kind": "digits",
    **{knob: Like(knob, times=3.0) for knob in IN_EPOCHS},
}
JUDGED_BY_SHAPES: Changes = {
    "evals.data.kind": "shapes",
    **{
        f"evals.data.{knob}": Like(f"data.{knob}")
        for knob in ("class_factor", "image_size", "train_images", "test_images", "draw_seed")
    },
}

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "trained -> judged",
            {
                "shapes -> shapes": {},
                "digits -> shapes": {**ON_DIGITS, **JUDGED_BY_SHAPES},
                "digits -> digits": ON_DIGITS,
                "shapes -> digits": {"evals.data.kind": "digits"},
            },
        )
    ],
    seeds=[0, 1, 2],
    fixed={"data.kind": "shapes"},
)
