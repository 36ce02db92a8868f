from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from dino_lab.core.settings import KnobError, Settings


class Round(Settings):
    kind: Literal["round"] = "round"
    radius: float = Field(default=1.0, gt=0)


class Square(Settings):
    kind: Literal["square"] = "square"
    side: float = Field(default=2.0, gt=0)


class Inner(Settings):
    temp: float = Field(default=0.1, gt=0)
    number: int = Field(default=3, ge=0)
    scale: tuple[float, float] = (0.4, 1.0)

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("allowed is min <= max")
        return value


class Plain(Settings):
    kind: Literal["plain"] = "plain"
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round(radius=3.0)


class Fancy(Settings):
    kind: Literal["fancy"] = "fancy"
    number: int = 7
    shape: Annotated[Square | Round, Field(discriminator="kind")] = Square(side=4.0)


class Nested(Settings):
    style: Annotated[Plain | Fancy, Field(discriminator="kind")] = Plain()


class Machine(Settings):
    cpus: int = 1


class Outer(Settings):
    not_identity = frozenset({"machine"})

    seed: int = 0
    flag: bool = True
    folder: str | None = None
    inner: Inner = Inner()
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round()
    machine: Machine = Machine()


BASE = Outer()


def test_but_changes_what_it_names_and_nothing_else() -> None:
    changed = BASE.but({"inner.temp": 0.2, "seed": 4, "inner.scale": [0.1, 0.2]})
    expected = BASE.flat() | {"inner.temp": 0.2, "seed": 4, "inner.scale": [0.1, 0.2]}
    assert changed.flat() == expected
    assert changed.inner.scale == (0.1, 0.2)
    assert Outer() == BASE


def test_but_without_changes_is_the_same() -> None:
    assert BASE.but({}) == BASE


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        BASE.inner.temp = 3.0


def test_flat_lists_every_knob_in_the_order_of_the_files() -> None:
    assert BASE.flat() == {
        "seed": 0,
        "flag": True,
        "folder": None,
        "inner.temp": 0.1,
        "inner.number": 3,
        "inner.scale": [0.4, 1.0],
        "shape.kind": "round",
        "shape.radius": 1.0,
        "machine.cpus": 1,
    }
    assert list(BASE.flat())[:4] == ["seed", "flag", "folder", "inner.temp"]


def test_settings_survive_json() -> None:
    trial = BASE.but({"shape.kind": "square", "shape.side": 5.0, "inner.scale": [0.2, 0.3]})
    assert Outer.of(trial.model_dump(mode="json")) == trial


@pytest.mark.parametrize(
    "changes",
    [
        {"shape.kind": "square", "shape.side": 5.0},
        {"shape.side": 5.0, "shape.kind": "square"},
    ],
)
def test_another_kind_starts_from_its_defaults_and_takes_its_own_knobs_in_any_order(changes: dict[str, Any]) -> None:
    assert BASE.but({"shape.radius": 9.0}).but(changes).shape == Square(side=5.0)


class Coarse(Settings):
    kind: Literal["coarse"] = "coarse"
    grain: int = 1
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round()


class Fine(Settings):
    kind: Literal["fine"] = "fine"
    grain: int = Field(default=9, ge=0)
    shape: Annotated[Square | Round, Field(discriminator="kind")] = Square()
    other: Machine = Machine()


class Open(Settings):
    kind: Literal["open"] = "open"
    grain: int | None = None


class Grained(Settings):
    style: Annotated[Coarse | Fine | Open, Field(discriminator="kind")] = Coarse()


def test_another_kind_keeps_what_both_have_of_the_same_sort() -> None:
    before = Grained().but({"style.grain": 4, "style.shape.radius": 2.5})
    # A section of another kind is not of the same sort; it starts from the new kind's own default.
    assert before.but({"style.kind": "fine"}).style == Fine(grain=4)
    square = before.but({"style.shape.kind": "square", "style.shape.side": 6.0})
    assert square.but({"style.kind": "fine"}).style == Fine(grain=4, shape=Square(side=6.0))
    assert before.but({"style.kind": "fine", "style.grain": 2}).style == Fine(grain=2)


def test_what_one_kind_leaves_open_and_another_sets_is_not_kept() -> None:
    coarse = Grained().but({"style.grain": 4})
    assert coarse.but({"style.kind": "open"}).style == Open()
    assert coarse.but({"style.kind": "open"}).but({"style.kind": "fine"}).style == Fine()


def test_the_same_kind_again_keeps_its_knobs() -> None:
    assert BASE.but({"shape.radius": 9.0}).but({"shape.kind": "round"}).shape == Round(radius=9.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"style.kind": "fancy"}, Fancy()),
        ({"style.shape.side": 9.0, "style.kind": "fancy"}, Fancy(shape=Square(side=9.0))),
        ({"style.shape.kind": "round", "style.kind": "fancy", "style.number": 1}, Fancy(number=1, shape=Round())),
        ({"style.shape.radius": 2.0}, Plain(shape=Round(radius=2.0))),
    ],
)
def test_kinds_within_kinds_start_from_the_defaults_of_the_outer_one(changes: dict[str, Any], expected: Any) -> None:
    assert Nested().but(changes).style == expected


def test_the_knobs_of_every_kind_are_known() -> None:
    shape = {"style.shape.kind", "style.shape.radius", "style.shape.side"}
    assert Nested.knobs() == {"style.kind", "style.number"} | shape


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"shape.radus": 1.0}, ["unknown knob 'shape.radus'; did you mean 'shape.radius'?"]),
        ({"inner.tmp": 1.0}, ["unknown knob 'inner.tmp'; did you mean 'inner.temp'?"]),
        ({"temp": 1.0}, ["unknown knob 'temp'; did you mean 'inner.temp'?"]),
        ({"shape.side": 1.0}, ["shape.side: no knob of shape.kind = 'round'"]),
        ({"shape.temp": 1.0}, ["unknown knob 'shape.temp'; did you mean 'inner.temp'?"]),
        ({"iner.temp": 1.0}, ["unknown knob 'iner.temp'; did you mean 'inner.temp'?"]),
        ({"inner.kind": "x"}, ["unknown knob 'inner.kind'; did you mean 'shape.kind'?"]),
        ({"kind": "x"}, ["unknown knob 'kind'; did you mean 'shape.kind'?"]),
        ({"shape.kind.x": "y"}, ["unknown knob 'shape.kind.x'"]),
        ({"inner.temp.x": 1.0}, ["unknown knob 'inner.temp.x'; did you mean 'inner.temp'?"]),
        ({"qqq": 1.0}, ["unknown knob 'qqq'; known: flag, folder, inner.number"]),
        ({"inner.temp": -1.0}, ["inner.temp = -1.0: input should be greater than 0"]),
        ({"shape.radius": 0.0}, ["shape.radius = 0.0: input should be greater than 0"]),
        ({"inner.number": 1.5}, ["inner.number = 1.5: "]),
        ({"inner.number": "3"}, ["inner.number = '3': "]),
        ({"inner.number": True}, ["inner.number = True: "]),
        ({"flag": 1}, ["flag = 1: "]),
        ({"inner.temp": float("nan")}, ["inner.temp = nan: input should be a finite number"]),
        ({"inner.temp": float("inf")}, ["inner.temp = inf: input should be a finite number"]),
        ({"shape.kind": "triangle"}, ["'round', 'square'"]),
        ({"inner.scale": [0.5, 0.1]}, ["inner.scale = [0.5, 0.1]: allowed is min <= max"]),
        ({"inner.temp": -1.0, "seed": "x"}, ["inner.temp = -1.0: ", "seed = 'x': "]),
    ],
)
def test_a_wrong_knob_is_named_with_its_value_and_what_is_allowed(changes: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(KnobError) as raised:
        BASE.but(changes)
    message = str(raised.value)
    assert len(message.splitlines()) == len(lines)
    assert all(line in message for line in lines), message


def test_values_from_json_are_checked_as_well() -> None:
    with pytest.raises(KnobError, match=r"inner\.temp = 0"):
        Outer.of({"inner": {"temp": 0.0}})
    with pytest.raises(KnobError, match=r"unknown knob 'inner\.tmp'; did you mean 'inner\.temp'"):
        Outer.of({"inner": {"tmp": 0.1}})


def test_a_knob_error_is_a_value_error() -> None:
    assert issubclass(KnobError, ValueError)


# --------------------------------------------------------------------------------------------------- identity


def test_identity_is_ten_hexadecimal_digits() -> None:
    assert len(BASE.identity) == 10
    int(BASE.identity, 16)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"flag": False}, {"inner.temp": 0.10001}, {"shape.kind": "square"}, {"folder": "x"}]
)
def test_identity_changes_with_every_knob_that_may_affect_results(changes: dict[str, Any]) -> None:
    assert BASE.but(changes).identity != BASE.identity


def test_identity_leaves_out_what_should_not_affect_results() -> None:
    assert BASE.but({"machine.cpus": 8}).identity == BASE.identity


def test_identity_depends_on_values_alone() -> None:
    assert BASE.but({"inner.temp": 1}).identity == BASE.but({"inner.temp": 1.0}).identity
    assert Outer.of(BASE.model_dump(mode="json")).identity == BASE.identity
    assert BASE.but({"seed": 5}).but({"seed": 0}).identity == BASE.identity


class Placed(Settings):
    folder: str = "here"
    digest: str | None = None

    def _unidentified(self) -> frozenset[str]:
        return frozenset({"folder"} if self.digest else ())


class Around(Settings):
    placed: Placed = Placed()


def test_a_section_may_leave_fields_out_of_the_identity() -> None:
    here, there = Around(), Around().but({"placed.folder": "there"})
    assert here.identity != there.identity
    known = [each.but({"placed.digest": "a"}).identity for each in (here, there)]
    assert known[0] == known[1] != here.identity
    assert Around().but({"placed.digest": "b"}).identity != known[0]
