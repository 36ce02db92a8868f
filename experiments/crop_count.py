"""What do local crops buy?

Expect: more local crops are better and cost time in proportion; two global crops alone are worst (paper, Table 8).

Command: dino-lab run crop_count
Cost: 12 trials on shapes_cpu, about 7 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "local_crops_number",
            {f"2+{number}": {"crops.local_crops_number": number} for number in (4, 0, 2, 6)},
        )
    ],
    seeds=[0, 1, 2],
    published="crop_count",
)
