"""The `prod` channel in a run's store: states signed by us, and believed only when the release role signed them."""

from sop.broadcast.channels import newest_state, open_state, publish_state
from sop.core import layout
from sop.core.channel import PROD, ChannelState, PolicyRef
from sop.core.codec import content_hash
from sop.core.errors import NotFound, RunError
from sop.transport import EventBus, ObjectStore
from sop.trust import MAX_ENVELOPE_BYTES, SigningKey, TrustRoot


class SignedChannel:
    """`ChannelPort` over a store. Blocks as the store does.

    Args:
        store: of the run.
        bus: announces new states.
        signer: key of the release role; None only reads.
        root: whom to believe.
        run: `RunManifest.name`.
    """

    def __init__(
        self, store: ObjectStore, bus: EventBus | None, signer: SigningKey | None, root: TrustRoot, run: str
    ) -> None:
        self._store = store
        self._bus = bus
        self._signer = signer
        self._root = root
        self._run = run
        self._newest: ChannelState | None = None

    def newest(self) -> ChannelState | None:
        """See `ChannelPort`; a state that is known already is not read again."""
        after = 0 if self._newest is None else self._newest.sequence
        found = newest_state(self._store, PROD, self._root, self._run, after)
        if found is not None:
            self._newest = found.state
        return self._newest

    def read(self, sequence: int) -> ChannelState | None:
        """See `ChannelPort`.

        Raises:
            Untrusted: what lies there is not vouched for.
        """
        try:
            envelope = self._store.get(layout.channel_state(PROD, sequence), slice(0, MAX_ENVELOPE_BYTES + 1))
        except NotFound:
            return None
        return open_state(envelope, self._root, self._run, PROD)

    def publish(self, state: ChannelState) -> None:
        """See `ChannelPort`.

        Raises:
            RunError: the number is taken, or there is nothing to sign or announce with.
        """
        if self._signer is None or self._bus is None:
            raise RunError("this identity signs no channels: take one of the role `release`")
        publish_state(self._store, self._bus, self._signer, state)


def policy_ref(store: ObjectStore, version: int) -> PolicyRef:
    """What a state names: a published version and the hash of its manifest. Blocks.

    Raises:
        RunError: the version is not published.
    """
    try:
        return PolicyRef(version, content_hash(store.get(layout.policy_manifest(version))))
    except NotFound as error:
        raise RunError(f"policy {version} is not published: `sop inspect` lists those that are") from error
