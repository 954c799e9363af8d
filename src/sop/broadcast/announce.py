"""Telling subscribers that something is in the store: a hint that may be lost."""

import logging

from sop.core.errors import StoreUnavailable
from sop.core.events import TOPIC_POLICIES, ChannelChanged, PolicyPublished, encode_event
from sop.transport.base import EventBus

_log = logging.getLogger(__name__)


def announce(bus: EventBus, event: PolicyPublished | ChannelChanged, key: str) -> bool:
    """Publish an event about the object under `key`, once (the key is its id); False when the bus did not take it:
    subscribers find the object by listing. Blocks for a moment."""
    try:
        bus.publish(TOPIC_POLICIES, encode_event(event), event_id=key)
    except StoreUnavailable as error:
        _log.warning("%s is in the store, but was not announced: %s", key, error)
        return False
    return True
