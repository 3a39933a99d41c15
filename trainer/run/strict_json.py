"""JSON as its standard has it (RFC 8259): a number that is not finite is null, which Python would
write as NaN."""

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["finite_or_null", "to_json"]


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Serialize `value`; NaN and infinities become null, which every parser of JSON reads."""
    return json.dumps(finite_or_null(value), indent=indent, allow_nan=False)


def finite_or_null(value: Any) -> Any:
    """Return `value` with None in place of each float that is not finite, in lists and dictionaries
    as well."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(each) for each in value]
    return value
