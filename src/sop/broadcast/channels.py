"""States of channels in the store: what the robots of a channel run, one signed object per state.

    channels/train/00000007.json    newest = highest number; each replaces the one before as a whole
    channels/prod/00000012.json
    channels/root/00000002.json     the trust root's next versions, for robots that believe the one before

The object is the order, the event a hint. Whoever lists a channel and finds nothing new keeps what he knows.
"""

import logging
from dataclasses import dataclass

from sop.broadcast.announce import announce
from sop.core import layout
from sop.core.channel import CHANNEL_TYPE, ChannelState, decode_record, encode_record
from sop.core.errors import AlreadyExists, InvalidRecord, NotFound, RunError, Untrusted
from sop.core.events import ChannelChanged
from sop.transport.base import EventBus, ObjectStore
from sop.trust import MAX_ENVELOPE_BYTES, RELEASE, SigningKey, TrustRoot

_log = logging.getLogger(__name__)
ROOTS = "root"
"""The folder beside the channels in which trust roots are numbered."""
MAX_BAD_STATES = 8
"""States that are refused before looking stops: whoever writes rubbish can hide news for a while, as one who serves
nothing can, but cannot make a robot read for ever."""


@dataclass(frozen=True, slots=True)
class SignedState:
    """A state of a channel that the release role vouches for."""

    state: ChannelState
    envelope: bytes


def publish_state(store: ObjectStore, bus: EventBus, signer: SigningKey, state: ChannelState) -> str:
    """Put the next state of a channel and announce it; returns its key. Blocks until it is durable in the store.

    Of two writers of the same number one succeeds. A lost event costs latency only: robots list.

    Raises:
        RunError: this number is taken: somebody else ordered something meanwhile; look at it before ordering again.
        StoreUnavailable: no answer; whether the state is there is not known: read before ordering again.
    """
    key = layout.channel_state(state.channel, state.sequence)
    try:
        store.put(key, signer.sign(CHANNEL_TYPE, encode_record(state)))
    except AlreadyExists as error:
        raise RunError(
            f"state {state.sequence} of channel {state.channel} exists already: somebody else gave an order meanwhile. "
            f"Look at the newest state, then order again with number {state.sequence + 1} or later"
        ) from error
    event = ChannelChanged(
        channel=state.channel, sequence=state.sequence, state=key, published_utc_ns=state.issued_utc_ns
    )
    announce(bus, event, key)
    return key


def newest_state(store: ObjectStore, channel: str, root: TrustRoot, run: str, after: int = 0) -> SignedState | None:
    """The state with the highest number above `after` that is valid; None when there is none. Blocks: lists.

    What is not signed by the release role, is of another run or channel, or lies under another number is passed over
    and logged, up to MAX_BAD_STATES of them.

    Args:
        store: is listed and read only.
        channel: one of `sop.core.channel.CHANNELS`.
        root: whom to believe.
        run: `RunManifest.name`.
        after: number of the newest state that is known already; it is never read again.

    Raises:
        StoreUnavailable: no answer; the same call may work later.
    """
    start = layout.channel_state(channel, after) if after else None
    newest = sorted(store.keys(f"{layout.CHANNELS}/{channel}/", start))[-MAX_BAD_STATES:]
    for key in reversed(newest):
        try:
            return _open(store.get(key, slice(0, MAX_ENVELOPE_BYTES + 1)), key, channel, root, run)
        except (Untrusted, NotFound) as error:
            _log.warning("%s is passed over: %s", key, error)
    return None


def open_state(envelope: bytes, root: TrustRoot, run: str, channel: str) -> ChannelState:
    """The state of an envelope.

    Raises:
        Untrusted: not signed by the release role, not a state, or of another run or channel.
    """
    payload = root.vouched(envelope, CHANNEL_TYPE, RELEASE)
    try:
        state = decode_record(payload, ChannelState)
    except InvalidRecord as error:
        raise Untrusted(f"what was signed is no state of a channel: {error}") from error
    if (state.run, state.channel) != (run, channel):
        raise Untrusted(f"a state of channel {state.channel} of run {state.run[:80]!r}, not {channel} of {run!r}")
    return state


def next_root(store: ObjectStore, root: TrustRoot) -> bytes | None:
    """Envelope of the trust root after this one, unchecked (see `TrustRoot.successor`), None when there is none.

    Blocks.

    Raises:
        StoreUnavailable: no answer; the same call may work later.
    """
    try:
        return store.get(layout.channel_state(ROOTS, root.version + 1), slice(0, MAX_ENVELOPE_BYTES + 1))
    except NotFound:
        return None


def publish_root(store: ObjectStore, envelope: bytes) -> str:
    """Put the next trust root, so that robots find it without a visit; returns its key. Blocks until it is durable.

    Raises:
        Untrusted: not a trust root signed by its own keys.
        RunError: this version is there already.
        StoreUnavailable: no answer.
    """
    version = TrustRoot.open(envelope).version
    key = layout.channel_state(ROOTS, version)
    try:
        store.put(key, envelope)
    except AlreadyExists as error:
        raise RunError(f"version {version} of the trust root exists already: take version {version + 1}") from error
    return key


def _open(envelope: bytes, key: str, channel: str, root: TrustRoot, run: str) -> SignedState:
    state = open_state(envelope, root, run, channel)
    if key != layout.channel_state(channel, state.sequence):
        raise Untrusted(f"state {state.sequence} lies under the name of another")
    return SignedState(state, envelope)
