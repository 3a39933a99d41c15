"""Roles of configuration fields that do not change what is trained, as metadata of the field."""

import dataclasses
from typing import Literal, get_type_hints

Role = Literal["host", "machine", "execution", "place", "habit"]
"""host: may differ between the hosts of a job. machine: device, threads and handling of faults,
which may change when a run is resumed. execution: changes at most the last bits. place: where a run
is written. habit: how it is kept and watched."""


def role(name: Role) -> dict[str, Role]:
    """Return the metadata of a field with this role."""
    return {"role": name}


def fields_with_role(config: type, *roles: Role, prefix: str = "") -> frozenset[str]:
    """Return the dotted names of fields of a dataclass, and of its parts, with one of `roles`.

    A part with a role gives it to all of its fields.
    """
    names: set[str] = set()
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        name, kind = prefix + field.name, hints[field.name]
        is_part = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        if field.metadata.get("role") in roles:
            names |= {f"{name}.{part.name}" for part in dataclasses.fields(kind)} if is_part else {name}
        elif is_part:
            names |= fields_with_role(kind, *roles, prefix=f"{name}.")
    return frozenset(names)
