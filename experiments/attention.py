"""Does the attention of DINO find the object, where that of supervised training does not?

Expect: yes: with 60 % of the attention of the best head, the Jaccard index of objects in PASCAL VOC is 22 for random
weights, 27 for supervised training and 46 for DINO (paper, Section 4.2.2 and Figure 4, ViT-S/16). Elsewhere than on
shapes, objects have to be marked: --set evals.data.kind=voc --set evals.data.root=DIR.

Command: dino-lab run attention
Cost: 6 trials on shapes_cpu, about 3 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis("method", {"dino": {}, "supervised": {"method.kind": "supervised"}})],
    seeds=[0, 1, 2],
    fixed={"evals.at_end": ["knn", "factors", "linear", "low_shot", "retrieval", "attention", "pictures"]},
)
