"""Settings: the strict, frozen base class of every knob in the lab.

A knob is a field of the Settings class in the file that uses it. Nothing writes to settings after they
are made: a variant is `settings.but({"method.teacher_temp": 0.06})`, which validates everything again.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

Knob: TypeAlias = str | int | float | bool | list[Any] | None


class KnobError(ValueError):
    """A knob that does not exist, or a value that it does not take: one line for each, none lost."""


class Settings(BaseModel):
    """Frozen, closed, strict; no NaN and no infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    not_identity: ClassVar[frozenset[str]] = frozenset()
    """Fields that should not affect results, left out of `identity`."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Validates nested plain values, as they come from JSON.

        Raises:
            KnobError: naming every wrong knob, its value and what is allowed.
        """
        try:
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise KnobError(_explain(error, set(cls().flat()))) from None

    def but(self, changes: Mapping[str, Any]) -> Self:
        """These settings with some knobs changed, everything validated again.

        Knobs are dotted paths. A changed `kind` starts its section afresh from that kind's defaults.

        Raises:
            KnobError: naming every wrong knob, its value and what is allowed.
        """
        values = self.model_dump(mode="json")
        known = set(self.flat())
        wrong: list[str] = []
        # `kind` first: the other changes of that section are meant for the new kind.
        for path, value in sorted(changes.items(), key=lambda item: not item[0].endswith("kind")):
            *sections, name = path.split(".")
            node: Any = values
            for section in sections:
                node = node.get(section) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                wrong.append(f"unknown knob {path!r}{_did_you_mean(path, known)}")
            elif name == "kind" and node.get("kind") != value:
                node.clear()
                node["kind"] = value
            else:
                node[name] = value
        if wrong:
            raise KnobError("\n".join(wrong))
        try:
            return type(self).model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise KnobError(_explain(error, known)) from None

    def flat(self) -> dict[str, Knob]:
        """Every knob by its dotted path, in the order of the files; values as in JSON."""
        return dict(_flatten(self.model_dump(mode="json")))

    @property
    def identity(self) -> str:
        """Ten hexadecimal digits of a hash of the whole resolved settings, runtime left out."""
        values = self.model_dump(mode="json", exclude=set(self.not_identity))
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Knob]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _did_you_mean(path: str, known: set[str]) -> str:
    near = difflib.get_close_matches(path, known, n=1)
    # A right name in a wrong section is nearer than any spelling.
    same_name = [knob for knob in sorted(known) if knob.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    near = same_name[:1] or near
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def _explain(error: ValidationError, known: set[str]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        parts = [str(part) for part in problem["loc"]]
        # pydantic puts the tag of a union into the path: data.shapes.noise.
        path = ".".join(part for i, part in enumerate(parts) if ".".join([*parts[:i], "kind"]) not in known or i == 0)
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown knob {path!r}{_did_you_mean(path, known)}")
        elif problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        else:
            lines.append(f"{path} = {problem['input']!r}: {problem['msg'].lower()}")
    return "\n".join(lines)
