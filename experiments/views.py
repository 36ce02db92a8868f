"""Knobs of several kinds of crop at once: `crops.global_1`, `crops.global_2`, `crops.local`; no experiment itself."""

from dino_lab.ablation import Changes

GLOBAL = ("global_1", "global_2")
ALL = (*GLOBAL, "local")


def of(views: tuple[str, ...], changes: Changes) -> Changes:
    """The same changes of each of these kinds of crop."""
    return {f"crops.{view}.{knob}": value for view in views for knob, value in changes.items()}
