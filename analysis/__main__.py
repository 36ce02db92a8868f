"""`python -m analysis NAME... --lab DIR --baseline B --set knob=value`: writes reports, prints their folders."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from analysis import report


def _change(text: str) -> tuple[str, Any]:
    knob, _, value = text.partition("=")
    try:
        return knob, json.loads(value)
    except json.JSONDecodeError:
        return knob, value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description="Writes the reports of ablations and searches."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="an ablation or a search")
    parser.add_argument("--lab", type=Path, default=Path("lab"), help="the folder that holds everything (./lab)")
    parser.add_argument("--baseline", default="shapes_cpu", help="the baseline that it was run with (shapes_cpu)")
    parser.add_argument(
        "--set", type=_change, action="append", default=[], metavar="KNOB=VALUE", help="as it was run with; repeatable"
    )
    parser.add_argument(
        "--tracking-uri",
        default=os.environ.get("MLFLOW_TRACKING_URI"),
        help="where the run mirrored its records ($MLFLOW_TRACKING_URI; else the lab's own store)",
    )
    options = parser.parse_args()
    for name in options.names:
        try:
            folder = report.write(
                options.lab,
                name,
                baseline=options.baseline,
                overrides=dict(options.set),
                tracking_uri=options.tracking_uri,
            )
            print(folder)
        except (KeyError, IndexError):
            # Lookup errors too, but of the code and not of the person who asks.
            raise
        except (LookupError, ValueError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
