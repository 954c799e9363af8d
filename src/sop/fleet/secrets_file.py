"""Secret halves of the credentials that we made for the store: its server has to be told them again and again."""

from pathlib import Path

import msgspec

from sop.core.errors import RunError
from sop.fleet.files import check_private, read_file, write_file

FILE = "store_secrets.json"


class StoreSecrets:
    """The file `store_secrets.json` (0600) of a fleet's folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def start(self) -> None:
        """Make the file."""
        write_file(self._path, b"{}")

    def all(self) -> dict[str, str]:
        """Name of a member -> secret.

        Raises:
            RunError: missing, damaged, or others can read it; never quotes it.
        """
        check_private(self._path)
        try:
            return msgspec.json.decode(read_file(self._path), type=dict[str, str])
        except msgspec.DecodeError:
            raise RunError(f"{self._path} is damaged: take it from a backup") from None

    def keep(self, name: str, secret: str) -> None:
        """Remember the secret of a member; an empty one is forgotten. Durable."""
        kept = self.all() | {name: secret}
        write_file(self._path, msgspec.json.encode({who: what for who, what in kept.items() if what}))
