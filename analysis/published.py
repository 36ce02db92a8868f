"""The paper's numbers, as its authors printed them."""

from collections.abc import Mapping
from importlib.resources import files

import pandas as pd


def published(study: str, arms: Mapping[str, str]) -> pd.DataFrame:
    """Row, metric, value, source and setting of each number of a study; no rows for a study that it does not have.

    The row of a number has the name of the paper's arm, unless `arms` gives that arm to another row.
    """
    # Data of the experiments package, read as a resource: none of its code is needed.
    with (files("experiments") / "published" / "dino_paper.csv").open() as file:
        numbers = pd.read_csv(file, dtype={"arm": str}, keep_default_na=False)
    numbers = numbers[numbers["study"] == study].drop(columns=["study", "knobs"]).reset_index(drop=True)
    rows = {arm: row for row, arm in arms.items()}
    return numbers.assign(arm=numbers["arm"].replace(rows)).rename(columns={"arm": "row"})
