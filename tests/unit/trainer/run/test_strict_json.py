"""JSON without the tokens that Python adds to it."""

import json
import math

import pytest

from bitfleet.trainer.run.strict_json import to_json


def test_numbers_that_are_not_finite_are_null_at_any_depth() -> None:
    value = {
        "a": math.nan,
        "b": [1.0, -math.inf, {"c": math.inf}],
        "d": (2, math.nan),
        "e": "NaN",
        "f": None,
        "g": True,
    }

    def refuse(token: str) -> None:
        pytest.fail(f"{token} is not JSON")

    read = json.loads(to_json(value), parse_constant=refuse)
    assert read == {"a": None, "b": [1.0, None, {"c": None}], "d": [2, None], "e": "NaN", "f": None, "g": True}


def test_what_is_finite_is_written_as_before() -> None:
    value = {"step": 3, "loss": 0.1 + 0.2, "names": ["x"], "none": None}
    assert to_json(value, indent=2) == json.dumps(value, indent=2)
