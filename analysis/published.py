"""The paper's numbers, as its authors printed them."""

from importlib.resources import files

import pandas as pd


def published(study: str) -> pd.DataFrame:
    """Arm, metric, value, source and setting of each number of a study; no rows for a study that it does not have."""
    # Data of the experiments package, read as a resource: none of its code is needed.
    with (files("experiments") / "published" / "dino_paper.csv").open() as file:
        numbers = pd.read_csv(file, dtype={"arm": str}, keep_default_na=False)
    return numbers[numbers["study"] == study].drop(columns=["study", "knobs"]).reset_index(drop=True)
