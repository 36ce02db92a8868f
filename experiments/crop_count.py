"""What do local crops buy?

Expect: more local crops are better and cost time and memory; two global crops alone are worst (paper, Table 8). The
report's table of costs stands beside the paper's hours and memory; on a processor memory is mostly the process itself.

Command: dino-lab run crop_count
Cost: 18 trials on shapes_cpu, about 10 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis("crops", {f"2+{number}": {"crops.local_crops_number": number} for number in (0, 2, 4, 6, 8, 10)})],
    seeds=[0, 1, 2],
    published="crop_count",
    paper_rows={"2+0": "2x224", "2+2": "2x224+2x96", "2+6": "2x224+6x96", "2+10": "2x224+10x96"},
)
