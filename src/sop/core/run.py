"""`run.json`: what every process of a run has to know before it starts. Created once, never changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from sop.core.embodiment import Embodiment
from sop.core.errors import InvalidRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RunManifest:
    """The identity of a run. Checked on construction.

    Raises:
        InvalidRecord: the name is not that of one folder.
    """

    name: str
    """Also of the folder for a machine's own files, so it must not lead anywhere else."""
    created_utc_ns: int
    embodiment: Embodiment
    instructions: Mapping[str, tuple[str, ...]]
    """Task id -> phrasings of its instruction; the first is used in evaluation."""
    fleet_tasks: tuple[str, ...]
    """Tasks that the fleet works on."""
    held_out_tasks: tuple[str, ...]
    """Tasks that live in the offline buffer only: they show whether generality is kept."""
    config: Mapping[str, Any]
    """The whole configuration of the run (JSON)."""
    simulated: bool = True
    """Whether the robots' world waits for them: then a step that comes late and an image that stays the same mean
    nothing, which on a real robot they do."""
    schema_version: int = 1

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name or not self.name.isprintable():
            raise InvalidRecord("name", f"must be the name of a folder, got {self.name[:80]!r}")

    def to_json(self) -> bytes:
        """Indented JSON, the content of `run.json`."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)

    @classmethod
    def from_json(cls, data: bytes) -> "RunManifest":
        """Read `run.json`.

        Raises:
            InvalidRecord: names the field that is wrong.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRecord("run.json", str(error)) from error
