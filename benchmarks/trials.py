"""Short trials a minute, here and in another checkout, side by side: python benchmarks/trials.py [OTHER_CHECKOUT].

21 trials of the baseline `smoke`, as many at a time as there are processors. What a trial takes beyond its own work is
the wall time of all processors, less what the trials' own records say, over the number of trials.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
RUN = ["run", "collapse", "--baseline", "smoke", "--seeds", "0,1,2,3,4,5,6", "--json"]


def measured(checkout: Path) -> tuple[float, float]:
    """Trials a minute, Ray's start and end included; and seconds a trial beyond its own work."""
    with tempfile.TemporaryDirectory() as lab:
        code = "from dino_lab.cli import main; main()"
        said = subprocess.run(
            [sys.executable, "-c", code, *RUN, "--lab", lab],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE,
            check=True,
        )
    run = json.loads(said.stdout)
    own = sum(trial["seconds"] for trial in run["trials"])
    number, at_a_time = len(run["trials"]), os.cpu_count() or 1
    return 60 * number / run["seconds"], (at_a_time * run["seconds"] - own) / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, nargs="?", help="a checkout of another commit")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    checkouts = [HERE, *([arguments.other.resolve()] if arguments.other else [])]
    for _ in range(arguments.turns):
        for checkout in checkouts:
            a_minute, beyond = measured(checkout)
            print(f"{checkout}: {a_minute:.1f} trials a minute, {beyond:.2f} s a trial beyond its own work", flush=True)


if __name__ == "__main__":
    main()
