"""The report of an ablation or a search: lab/reports/NAME/, all that is shown of it, in files that need nothing else.

The same records give the same bytes, so nothing here knows the time or the place of its making.
"""

import base64
import hashlib
import io
import json
import os
import platform
import re
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from analysis import figures, phase, records, search, search_figures, summary, tables
from analysis.records import Sweep
from dino_lab.core.records import COLLAPSES

_LIBRARIES = (
    "jinja2",
    "matplotlib",
    "numpy",
    "optuna",
    "pandas",
    "pandera",
    "pyarrow",
    "scipy",
    "tabulate",
    "tueplots",
)


def write(
    lab: Path,
    name: str,
    *,
    baseline: str,
    overrides: Mapping[str, Any],
    asked: Collection[tuple[str, str]] | None = None,
    tracking_uri: str | None = None,
) -> Path:
    """Writes the report of what `records.read` finds, each file atomically, the manifest last; returns its folder.

    Files of an earlier report that this one does not have are removed.

    Raises:
        LookupError, ValueError: as `records.read`.
    """
    sweep = records.read(lab, name, baseline=baseline, overrides=overrides, asked=asked, tracking_uri=tracking_uri)
    files = contents(sweep)
    folder = lab / "reports" / name
    manifest = folder / "manifest.json"
    earlier = json.loads(manifest.read_text())["files"] if manifest.is_file() else {}
    for path, content in files.items():
        _write(folder / path, content)
    for path in earlier.keys() - files.keys():
        (folder / path).unlink(missing_ok=True)
    return folder


def contents(sweep: Sweep) -> dict[str, bytes]:
    """Every file of the report by its path in the folder; the manifest, last, tells of the others."""
    shown, drawn, files = _of_ablation(sweep) if sweep.search is None else _of_search(sweep)
    for stem, table in shown.items():
        files[f"{stem}.md"] = tables.markdown(table).encode()
        files[f"{stem}.tex"] = tables.latex(table, label=f"{sweep.name}-{stem}").encode()
    for stem, figure in drawn.items():
        files |= {f"{stem}.{form}": figures.render(figure, form) for form in figures.FORMATS}
    files["frames/trials.parquet"] = _parquet(sweep.trials)
    files["frames/curves.parquet"] = _parquet(sweep.curves)
    files = dict(sorted(files.items()))
    files["report.html"] = html(sweep, shown, {stem: files[f"{stem}.svg"] for stem in drawn}, list(files)).encode()
    files["manifest.json"] = _manifest(sweep, files).encode()
    return files


_Parts: TypeAlias = tuple[dict[str, tables.Table], dict[str, Figure], dict[str, bytes]]
"""Tables and figures by their stems, and other files by their paths."""


def _of_search(sweep: Sweep) -> _Parts:
    shares = search.importance(sweep)
    shown = {"trials": search.trials_table(sweep), "importance": search.importance_table(sweep, shares)}
    drawn = {
        "history": search_figures.history(sweep),
        "importance": search_figures.importance(sweep, shares),
        "slices": search_figures.slices(sweep, shares),
    }
    if len(search.asked(sweep).space) > 1:
        drawn["contour"] = search_figures.contour(sweep, shares)
    if len(search.asked(sweep).objectives) > 1:
        drawn["pareto"] = search_figures.pareto(sweep)
    files = {
        "trials.csv": tables.csv(search.trials(sweep)).encode(),
        "importance.csv": tables.csv(shares).encode(),
    }
    return shown, drawn, files


def _of_ablation(sweep: Sweep) -> _Parts:
    arms = tables.arms(sweep)
    arms_table = tables.arms_table(sweep)
    shown = {"table": arms_table}
    drawn = {"figure": figures.curves(sweep)}
    files = {"table.csv": tables.csv(arms).encode()}
    factors = tables.factors(sweep)
    if not factors.empty:
        shown["factors"] = tables.factors_table(sweep)
        drawn["factors"] = figures.factors(sweep)
        files["factors.csv"] = tables.csv(factors).encode()
    evaluations = tables.evaluations(sweep)
    if not evaluations.empty:
        shown["evaluations"] = tables.evaluations_table(sweep)
        files["evaluations.csv"] = tables.csv(evaluations).encode()
    if plane := phase.figure(sweep):
        drawn["phase"] = plane
        files["phase.csv"] = tables.csv(phase.cells(sweep)).encode()
    cost = tables.cost(sweep)
    if not cost.empty:
        shown["cost"] = tables.cost_table(sweep)
        files["cost.csv"] = tables.csv(cost).encode()
    return shown, drawn, files


def html(sweep: Sweep, shown: Mapping[str, tables.Table], drawn: Mapping[str, bytes], files: Collection[str]) -> str:
    """One self-contained page: it asks for nothing outside itself, and what a person wrote is text, never markup."""
    # An image is a data address rather than markup, since two SVGs in one page would share the names of their parts.
    images = {stem: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for stem, svg in drawn.items()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # Lines end where the source's do, but for those that begin with a word of their own: "Command:", "Cost:".
    note = re.sub(r"(?<!\n)\n(?!\n|[A-Z][a-z]+: )", " ", sweep.note.strip())
    question, *paragraphs = note.split("\n\n")
    of_kind = _facts_of_ablation(sweep) if sweep.search is None else _facts_of_search(sweep)
    return environment.get_template("report.html").render(
        sweep=sweep,
        question=question,
        paragraphs=paragraphs,
        shown=shown,
        images=images,
        files=files,
        words=tables.LEFT,
        versions=_versions(),
        **of_kind,
    )


def _facts_of_ablation(sweep: Sweep) -> dict[str, Any]:
    return {
        "counts": summary.counts(sweep.trials).sum(),
        "collapses": list(COLLAPSES),
        "states": _states(sweep.trials),
        "settings": _settings(sweep, sweep.baseline_row),
        "settings_of": sweep.baseline_row,
        "varied": _varied(sweep),
    }


def _facts_of_search(sweep: Sweep) -> dict[str, Any]:
    ranked = search.ranked(sweep)
    best = ranked[ranked["best"]].to_dict("records")
    first = ranked["row"].iloc[0]
    return {
        "outcome": search.outcome_line(sweep),
        "best": [
            {"row": trial["row"], "flags": search.flags(sweep, trial), "snippet": search.snippet(sweep, trial)}
            for trial in best
        ],
        "settings": _settings(sweep, first),
        "settings_of": first,
    }


def _states(trials: pd.DataFrame) -> dict[str, dict[int, Any]]:
    """Row -> seed -> trial; a seed without a trial is None."""
    seeds = sorted(trials["seed"].unique())
    by_place = {(trial.row, trial.seed): trial for trial in trials.itertuples()}
    return {row: {seed: by_place.get((row, seed)) for seed in seeds} for row in summary.rows(trials)}


def _settings(sweep: Sweep, row: str) -> dict[str, dict[str, Any]]:
    """Section -> knob -> value of a row, all seeds of which agree but for the seed."""
    trial = sweep.trials[sweep.trials["row"] == row].iloc[0]
    sections: dict[str, dict[str, Any]] = {}
    for column in _knobs(sweep.trials):
        section, _, knob = column.removeprefix("param:").rpartition(".")
        sections.setdefault(section, {})[knob] = _plain(trial[column])
    return sections


def _varied(sweep: Sweep) -> pd.DataFrame:
    """Rows x the knobs that are not the same in all of them."""
    first = sweep.trials.groupby("row", sort=False).first().reindex(summary.rows(sweep.trials))
    columns = [column for column in _knobs(sweep.trials) if first[column].nunique(dropna=False) > 1]
    return first[columns].map(_plain).rename(columns=lambda column: column.removeprefix("param:"))


def _knobs(trials: pd.DataFrame) -> list[str]:
    return [column for column in map(str, trials) if column.startswith("param:") and column != "param:seed"]


def _plain(value: Any) -> str:
    """As it is written on the command line; empty for a knob that the trial does not have."""
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else json.dumps(value.item() if hasattr(value, "item") else value)


def _parquet(frame: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    frame.to_parquet(file, index=False)
    return file.getvalue()


def _manifest(sweep: Sweep, files: Mapping[str, bytes]) -> str:
    columns = ["trial_id", "row", "seed", "state", "verdict"]
    facts = {
        "ablation" if sweep.search is None else "search": sweep.name,
        "baseline": sweep.baseline,
        "overrides": sweep.overrides,
        "trials": json.loads(sweep.trials[columns].to_json(orient="records")),
        "versions": _versions(),
        "files": {path: hashlib.sha256(content).hexdigest() for path, content in files.items()},
    }
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {library: version(library) for library in _LIBRARIES}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
