"""What a publisher shows for a version: that it is still the learner of the run, and its signature."""

from collections.abc import Callable, Iterator

from sop.core import layout
from sop.core.channel import STATEMENT_TYPE, PolicyRef, PolicyStatement, encode_record
from sop.core.codec import content_hash
from sop.trust import SigningKey

VALID_S = 7 * 24 * 3600.0
"""Seconds after which a robot that has not accepted a policy refuses it: long enough for a learner that stands still
over a weekend and for a clock that is a day off, short enough to notice a store that serves the past."""


def _no_lease() -> int:
    return 0


class Vouching:
    """The last objects of a version, each only while the lease is ours.

    Args:
        signer: the learner's key; None signs nothing.
        run: `RunManifest.name`; needed to sign.
        fence: token of our lease; raises when it is lost. None: nobody else could publish.
        clock_ns: UTC nanoseconds.

    Raises:
        ValueError: a signer without the name of the run.
    """

    def __init__(
        self, signer: SigningKey | None, run: str, fence: Callable[[], int] | None, clock_ns: Callable[[], int]
    ) -> None:
        if signer is not None and not run:
            raise ValueError("a signature says of which run a policy is: give the publisher `run` with the signer")
        self._signer = signer
        self._run = run
        self._fence = fence or _no_lease
        self._clock_ns = clock_ns

    def objects(self, version: int, manifest: bytes) -> Iterator[tuple[str, bytes]]:
        """(key, bytes) of the signature and then of the manifest, to be put in this order. The lease is checked before
        each is handed out: a learner that lost it between two puts leaves a signature without a policy: nothing.

        Raises:
            Exception: whatever `fence` raises; nothing of what is left may be put.
        """
        token = self._fence()
        if self._signer is not None:
            issued = self._clock_ns()
            statement = PolicyStatement(
                run=self._run,
                policy=PolicyRef(version, content_hash(manifest)),
                issued_utc_ns=issued,
                expires_utc_ns=issued + int(VALID_S * 1e9),
                fence=token,
            )
            yield layout.policy_signature(version), self._signer.sign(STATEMENT_TYPE, encode_record(statement))
            self._fence()
        yield layout.policy_manifest(version), manifest
