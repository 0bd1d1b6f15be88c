"""Snapshots as values: what they hold is found, iterated over, and comes back from JSON."""

import enum
import json
import math
import random
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from tests.conftest import record
from torchsat.record import Alert, Head, Record, Snapshot, Weight

SNAPSHOT = Snapshot(7, 0.0, (record("blocks.0.act"), record("blocks.1.act"), record("head")))


def test_a_snapshot_is_a_collection_of_records() -> None:
    assert [each.site for each in SNAPSHOT] == ["blocks.0.act", "blocks.1.act", "head"]
    assert list(SNAPSHOT) == list(SNAPSHOT.records)
    assert len(SNAPSHOT) == 3
    assert "head" in SNAPSHOT
    assert SNAPSHOT.records[0] in SNAPSHOT
    assert "blocks" not in SNAPSHOT
    assert record("other") not in SNAPSHOT
    assert 0 not in SNAPSHOT
    assert Snapshot(0, 0.0, ())
    assert SNAPSHOT["head"] is SNAPSHOT.records[2]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("blocks.0.ac", "no site 'blocks.0.ac' at step 7; near it: blocks.0.act, blocks.1.act"),
        ("zzz", "no site 'zzz' at step 7; near it: blocks.0.act, blocks.1.act, head"),
        (0, "no site 0 at step 7; near it: blocks.0.act, blocks.1.act, head"),
    ],
)
def test_a_site_that_is_not_there_is_answered_with_those_near_it(asked: Any, says: str) -> None:
    with pytest.raises(KeyError) as error:
        SNAPSHOT[asked]
    assert error.value.args == (says,)


def value_of(kind: Any, draw: random.Random) -> Any:
    """A random value of a field with this type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return value_of(draw.choice(arguments), draw)
    if origin is typing.Literal:
        return draw.choice(arguments)
    if origin is tuple:
        return tuple(value_of(arguments[0], draw) for _ in range(draw.randrange(4)))
    if is_dataclass(kind) and isinstance(kind, type):
        return any_of(kind, draw)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return draw.choice(list(kind))
    simple: dict[Any, Callable[[], Any]] = {
        type(None): lambda: None,
        bool: lambda: draw.random() < 0.5,
        int: lambda: draw.choice((0, 1, 2**24 + 1, 2**53 - 1, draw.randrange(10**6))),
        float: lambda: draw.choice((0.0, 1e-60, 1e300, math.inf, -math.inf, 1 / 3, draw.gauss(0, 1))),
        str: lambda: draw.choice(("", "blocks.3.act", "é\n\udcff", 'a "quoted" text')),
    }
    return simple[kind]()


def any_of(kind: type, draw: random.Random) -> Any:
    types_of = typing.get_type_hints(kind)
    return kind(**{field.name: value_of(types_of[field.name], draw) for field in fields(kind)})


def test_a_snapshot_comes_back_from_json_as_it_went_in() -> None:
    draw = random.Random(0)
    for _ in range(200):
        made: Snapshot = any_of(Snapshot, draw)
        back = Snapshot.from_dict(json.loads(json.dumps(made.as_dict())))
        assert back == made
        assert Snapshot.from_dict(made.as_dict()) == made
        assert hash(back) == hash(made)


def test_the_fields_of_another_version_are_left_out() -> None:
    made: Snapshot = any_of(Snapshot, random.Random(3))
    kept = made.as_dict()
    for each in (kept, *kept["records"], *kept["weights"], *kept["alerts"], *(cause for alert in kept["alerts"] for cause in alert["causes"])):
        each["of_a_later_version"] = 1
    assert Snapshot.from_dict(kept) == made
    without = Snapshot(0, 0.0, (record("a"),)).as_dict()
    del without["records"][0]["heads"], without["overhead"], without["weights"], without["alerts"]
    assert Snapshot.from_dict(without) == Snapshot(0, 0.0, (record("a"),))


def test_the_property_test_reaches_every_kind_of_value() -> None:
    draw = random.Random(0)
    made = [any_of(Snapshot, draw) for _ in range(200)]
    records = [each for snapshot in made for each in snapshot.records]
    assert any(isinstance(head, Head) for each in records for head in each.heads or ())
    assert any(each.heads == () for each in records)
    assert any(each.heads is None for each in records)
    assert any(alert.causes for snapshot in made for alert in snapshot.alerts)
    assert {type(each) for snapshot in made for each in (*snapshot.records, *snapshot.weights, *snapshot.alerts)} == {Record, Weight, Alert}
