"""Names and settings that people type: what is unknown is answered with the nearest that is known."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

S = TypeVar("S")


def suggestion(name: str, known: Iterable[str]) -> str:
    """The sentence that follows "no ... is called NAME": the nearest known name, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(names)}."


def build_settings(settings: type[S], values: Mapping[str, Any], where: str) -> S:
    """Make a settings dataclass from a mapping such as JSON; what is not named keeps its default.

    Args:
        settings: a frozen dataclass whose fields all have defaults.
        values: field name -> value; lists are accepted for tuples.
        where: begins every message, e.g. `policy flow_vla`.

    Raises:
        ValueError: an unknown name (with the nearest known one), a value of a wrong type, or one out of range.
    """
    known = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ValueError(f"{where}: no setting is called {name!r}. {suggestion(name, known)}")
    try:
        return msgspec.convert(dict(values), type=settings)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {error}") from error
