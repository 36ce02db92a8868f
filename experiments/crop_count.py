"""What do local crops buy?

Expect: more local crops are better and cost time in proportion; two global crops alone are worst (paper, Table 8).

Command: dino-lab run crop_count
Cost: 15 trials on shapes_cpu, about 8 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.one_at_a_time(
    axes=[Axis("crops", {f"2+{number}": {"crops.local_crops_number": number} for number in (0, 2, 6, 10)})],
    seeds=[0, 1, 2],
    published="crop_count",
    paper_rows={"2+0": "2x224", "2+2": "2x224+2x96", "2+6": "2x224+6x96", "2+10": "2x224+10x96"},
)
