"""Settings: the strict, frozen base class of every knob in the lab.

A knob is a field of the Settings class in the file that uses it. Nothing writes to settings after they
are made: a variant is `settings.but({"method.teacher_temp": 0.06})`, which validates everything again.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias, get_args

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
    let_go: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By field, others that return to their defaults where it is changed and they are not."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Validates nested plain values, as they come from JSON.

        Raises:
            KnobError: naming every wrong knob, its value and what is allowed.
        """
        try:
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise KnobError(_explain(error, cls.knobs())) from None

    def but(self, changes: Mapping[str, Any]) -> Self:
        """These settings with some knobs changed, everything validated again.

        Knobs are dotted paths. A changed `kind` starts its section from that kind's defaults, but keeps what the
        section had before under the same name, so that a switch changes nothing else: knobs, and sections of the same
        kind. Another name of a network lets go of the dimensions that were set for the one before.

        Raises:
            KnobError: naming every wrong knob, its value and what is allowed.
        """
        values = self.model_dump(mode="json")
        wrong: list[str] = []
        # Kinds and names first, outer ones before inner ones: other changes of a section are meant for what it becomes.
        for path, value in sorted(changes.items(), key=lambda item: _place(item[0])):
            *sections, name = path.split(".")
            node, variants = _section(type(self), values, sections)
            if not isinstance(node, dict):
                wrong.append(f"unknown knob {path!r}{_did_you_mean(path, self.knobs())}")
            elif name == "kind" and node.get("kind") != value:
                before = dict(node)
                node.clear()
                node.update(_carried(before, _of_kind(variants, value)))
            else:
                if node.get(name) != value:
                    node.update(_let_go(variants, name))
                node[name] = value
        try:
            changed = self.of(values)
        except KnobError as error:
            wrong.append(str(error))
        if wrong:
            raise KnobError("\n".join(wrong))
        return changed

    @classmethod
    def knobs(cls) -> set[str]:
        """The dotted paths of all knobs of all kinds."""
        known = set()
        for name, variants in _sections(cls).items():
            known |= {f"{name}.{knob}" for variant in variants for knob in variant.knobs()} or {name}
        return known

    def flat(self) -> dict[str, Knob]:
        """Every knob by its dotted path, in the order of the files; values as in JSON."""
        return dict(flatten(self.model_dump(mode="json")))

    @property
    def identity(self) -> str:
        """Ten hexadecimal digits of a hash of the whole resolved settings, runtime left out."""
        return hashlib.sha256(json.dumps(self._identified(), sort_keys=True).encode()).hexdigest()[:10]

    def _identified(self) -> dict[str, Any]:
        """What the identity is made of."""
        values = self.model_dump(mode="json", exclude=set(self._unidentified()))
        sections = {name: value for name, value in self if name in values and isinstance(value, Settings)}
        return values | {name: section._identified() for name, section in sections.items()}

    def _unidentified(self) -> frozenset[str]:
        """Fields that tell these settings from no others."""
        return self.not_identity


def _sections(settings: type[Settings]) -> dict[str, tuple[type[Settings], ...]]:
    """The Settings classes that each field may hold: several for a union of kinds, none for a plain knob."""
    return {
        name: tuple(
            variant
            for variant in get_args(field.annotation) or (field.annotation,)
            if isinstance(variant, type) and issubclass(variant, Settings)
        )
        for name, field in settings.model_fields.items()
    }


def _section(root: type[Settings], values: Any, path: Sequence[str]) -> tuple[Any, tuple[type[Settings], ...]]:
    """What stands at a path, and the classes that it may be of; not a dict if the path leads to no section."""
    variants: tuple[type[Settings], ...] = (root,)
    for name in path:
        if not isinstance(values, dict):
            break
        present = [each for each in variants if len(variants) == 1 or _kind(each) == values["kind"]]
        variants = tuple(variant for each in present for variant in _sections(each).get(name, ()))
        values = values.get(name)
    return values, variants


def _of_kind(variants: Iterable[type[Settings]], kind: Any) -> dict[str, Any]:
    """What a section holds when it has just become this kind; the bare kind if it may not, for validation to refuse."""
    for variant in variants:
        if _kind(variant) == kind:
            return variant.model_construct().model_dump(mode="json")
    return {"kind": kind}


def _carried(before: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a new kind, with what the section before had under the same name where it is of the same sort."""

    def same_sort(old: Any, new: Any) -> bool:
        if isinstance(old, dict) and isinstance(new, dict):
            return old.get("kind") == new.get("kind")
        # Where one kind leaves open what another sets, they do not mean the same.
        return isinstance(old, dict) == isinstance(new, dict) and (old is None) == (new is None)

    return {
        name: before[name] if name != "kind" and name in before and same_sort(before[name], value) else value
        for name, value in defaults.items()
    }


def _let_go(variants: Iterable[type[Settings]], name: str) -> dict[str, Any]:
    """What is left of the fields that are let go with this one: their defaults."""
    return {
        other: variant.model_fields[other].default for variant in variants for other in variant.let_go.get(name, ())
    }


def _kind(variant: type[Settings]) -> Any:
    """The name of a section's kind; None for a section that has one kind alone."""
    field = variant.model_fields.get("kind")
    return field and field.default


def _place(path: str) -> tuple[bool, int]:
    """Where a change is in turn: kinds and names before other knobs, outer ones before inner ones."""
    return path.rpartition(".")[2] not in ("kind", "name"), path.count(".")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Knob]]:
    """Dotted paths and values of nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
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
        path, kind = "", ""
        for part in map(str, problem["loc"]):
            # pydantic puts the tag of a union into the path: data.shapes.noise.
            if f"{path}.kind" in known and not kind.startswith(f"{path}.kind"):
                kind = f"{path}.kind = {part!r}"
            else:
                path = f"{path}.{part}" if path else part
        if problem["type"] == "extra_forbidden" and path in known:
            lines.append(f"{path}: no knob of {kind}")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"unknown knob {path!r}{_did_you_mean(path, known)}")
        elif problem["type"] == "value_error":
            said = str(problem["ctx"]["error"])
            # Of one knob, it says what is allowed; of a whole section, it names the knobs itself.
            lines.append(f"{path} = {problem['input']!r}: {said}" if path in known else said)
        elif problem["type"] == "missing":
            lines.append(f"{path}: has no default; must be set")
        elif problem["type"] == "union_tag_invalid":
            lines.append(f"{path}.kind = {problem['ctx']['tag']!r}: allowed are {problem['ctx']['expected_tags']}")
        else:
            lines.append(f"{path} = {problem['input']!r}: {problem['msg'].lower()}")
    return "\n".join(lines)
