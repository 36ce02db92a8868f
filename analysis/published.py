"""The paper's numbers, as its authors printed them."""

from collections.abc import Mapping
from importlib.resources import files

import pandas as pd


def published(study: str, paper_rows: Mapping[str, str]) -> pd.DataFrame:
    """Row, metric, value, source and setting of each number of a study; no rows for a study that it does not have.

    A row has the name of the paper's arm, unless `paper_rows` gives it another.
    """
    # Data of the experiments package, read as a resource: none of its code is needed.
    with (files("experiments") / "published" / "dino_paper.csv").open() as file:
        numbers = pd.read_csv(file, dtype={"arm": str}, keep_default_na=False)
    numbers = numbers[numbers["study"] == study].drop(columns=["study", "knobs"])
    rows = {arm: arm for arm in numbers["arm"] if arm not in paper_rows} | {arm: row for row, arm in paper_rows.items()}
    numbers.insert(0, "row", numbers.pop("arm").map(rows))
    return numbers.dropna(subset="row").reset_index(drop=True)
