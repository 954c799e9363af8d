"""Where the store and the bus of a run are, found from what is given on the command line.

runs/<name>/store/         the store, when it is a directory here; the bus is `bus.sqlite` beside it
runs/<name>/place.json     else: the URLs of both
runs/<name>/...            this machine's own files: spools, caches, logs, metrics, report
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from sop.core.errors import RunError
from sop.transport import default_bus_url, own_identity

STORE = "store"
"""Folder of a run in which its store is, when it is here."""
PLACE = "place.json"
"""File of a run whose store is elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """URLs of a run's store and bus; the content of `place.json`."""

    store: str
    bus: str


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / STORE).is_dir() or (folder / PLACE).is_file()


def keep_place(folder: Path, place: Place) -> None:
    """Write down where the run of this folder is; the folder is made when it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLACE).write_bytes(msgspec.json.format(msgspec.json.encode(place), indent=2))


def find_place(given: str, bus: str | None = None) -> Place:
    """The place of a run that is given by its folder or by the URL of its store.

    Args:
        given: folder or URL.
        bus: URL of the bus; None takes the one that is written down, that of our identity, or the one beside the store.

    Raises:
        RunError: a folder that is not that of a run, or its `place.json` is damaged.
        ValueError: the bus of a store that is not a directory has to be named.
    """
    folder = Path(given)
    if (folder / PLACE).is_file():
        try:
            place = msgspec.json.decode((folder / PLACE).read_bytes(), type=Place)
        except msgspec.DecodeError as error:
            raise RunError(f"{folder / PLACE}: {error}") from error
        return place if bus is None else Place(store=place.store, bus=bus)
    if is_run(folder):
        store = str(folder / STORE)
        return Place(store=store, bus=bus or default_bus_url(store))
    if "://" not in given:
        raise RunError(f"{given} is not the folder of a run (it has no {STORE}/): start one with `sop run`")
    identity = own_identity()
    if bus is None and identity is not None:
        bus = identity.record.bus
    return Place(store=given, bus=bus or default_bus_url(given))
