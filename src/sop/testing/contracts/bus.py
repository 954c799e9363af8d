"""The contract of `sop.transport.base.EventBus`, one function per rule."""

import threading
from collections.abc import Callable, Sequence

from sop.testing.contracts import require, require_equal, require_raises
from sop.transport.base import MAX_EVENT_BYTES, MAX_EVENTS_PER_POLL, Cursor, EventBus

OpenBus = Callable[[], EventBus]
"""Opens the bus under test; empty at the first call, the same place at every further one."""

_PATIENCE_S = 30.0
"""Upper bound of waits that end as soon as there is an event."""


def drain(bus: EventBus, topic: str, after: Cursor | None = None) -> tuple[list[bytes], Cursor | None]:
    """All events after a cursor that are there now, and the cursor behind them."""
    events: list[bytes] = []
    while found := bus.poll(topic, after, 0.0):
        events += [event for _, event in found]
        after = found[-1][0]
    return events, after


def events_come_in_the_order_of_publication(open_bus: OpenBus) -> None:
    """Every subscriber sees the same order, and topics do not mix."""
    bus = open_bus()
    for number in range(20):
        bus.publish("even" if number % 2 == 0 else "odd", b"%d" % number, f"id-{number}")
    for _ in range(2):
        require_equal(drain(bus, "even")[0], [b"%d" % number for number in range(0, 20, 2)], "topic even")
        require_equal(drain(bus, "odd")[0], [b"%d" % number for number in range(1, 20, 2)], "topic odd")
    require_equal(drain(bus, "other")[0], [], "a topic without events")


def an_event_id_is_taken_once_per_topic(open_bus: OpenBus) -> None:
    """A repeat is dropped whatever it carries, a thousand times over; another topic may use the id."""
    bus = open_bus()
    bus.publish("a", b"first", "id")
    for _ in range(1000):
        bus.publish("a", b"again", "id")
    bus.publish("b", b"other topic", "id")
    bus.publish("a", b"second", "id-2")
    require_equal(drain(bus, "a")[0], [b"first", b"second"], "topic a")
    require_equal(drain(bus, "b")[0], [b"other topic"], "topic b")


def a_cursor_resumes_exactly_behind_its_event(open_bus: OpenBus) -> None:
    """No event twice, none skipped, wherever the cursor was taken, also by somebody who opens the bus later."""
    bus = open_bus()
    for number in range(10):
        bus.publish("a", b"%d" % number, f"a-{number}")
        bus.publish("b", b"x", f"b-{number}")
    cursors = [cursor for cursor, _ in bus.poll("a", None, 0.0)]
    require_equal(len(set(cursors)), 10, "number of different cursors")
    for position, cursor in enumerate(cursors):
        require(isinstance(cursor, str), f"cursor {cursor!r} is not a str")
        expected = [b"%d" % number for number in range(position + 1, 10)]
        require_equal(drain(open_bus(), "a", cursor)[0], expected, f"events after cursor {position}")


def one_poll_returns_a_bounded_number(open_bus: OpenBus) -> None:
    """The rest comes with the next call, nothing is left out."""
    bus = open_bus()
    total = MAX_EVENTS_PER_POLL + 5
    for number in range(total):
        bus.publish("a", b"%d" % number, f"a-{number}")
    first = bus.poll("a", None, 0.0)
    require_equal(len(first), MAX_EVENTS_PER_POLL, "events of the first poll")
    require_equal(drain(bus, "a")[0], [b"%d" % number for number in range(total)], "all events")


def a_waiting_poll_returns_when_an_event_comes(open_bus: OpenBus) -> None:
    """Not at its time-out."""
    bus = open_bus()
    found: list[tuple[Cursor, bytes]] = []
    waiting = threading.Thread(target=lambda: found.extend(bus.poll("a", None, _PATIENCE_S)))
    waiting.start()
    bus.publish("other", b"no", "id")
    bus.publish("a", b"yes", "id")
    waiting.join(_PATIENCE_S / 2)
    require(not waiting.is_alive(), "poll still waits although there is an event")
    require_equal([event for _, event in found], [b"yes"], "what the waiting poll returned")


def a_poll_without_events_returns_nothing(open_bus: OpenBus) -> None:
    """An empty list, at once without a time-out and in the end with one."""
    bus = open_bus()
    require_equal(bus.poll("a", None, 0.0), [], "poll of an empty topic")
    require_equal(bus.poll("a", None, 0.02), [], "poll of an empty topic with a time-out")
    bus.publish("a", b"x", "id")
    _, cursor = drain(bus, "a")
    require_equal(bus.poll("a", cursor, 0.02), [], "poll behind the last event")


def bad_arguments_are_refused(open_bus: OpenBus) -> None:
    """Topics, ids, sizes and cursors that are none, and nothing is published for them."""
    bus = open_bus()
    for topic in ("", "a/b", "with space", "\u00e4", "a" * 101, "line\n"):
        require_raises(ValueError, f"publish on {topic!r}", bus.publish, topic, b"x", "id")
        require_raises(ValueError, f"poll of {topic!r}", bus.poll, topic, None, 0.0)
    require_raises(ValueError, "publish without an id", bus.publish, "a", b"x", "")
    require_raises(ValueError, "publish of data", bus.publish, "a", b"x" * (MAX_EVENT_BYTES + 1), "id")
    for cursor in ("", "no cursor"):
        require_raises(ValueError, f"poll after {cursor!r}", bus.poll, "a", cursor, 0.0)
    bus.publish("a", b"x" * MAX_EVENT_BYTES, "id")
    require_equal(drain(bus, "a")[0], [b"x" * MAX_EVENT_BYTES], "the only event that is allowed")


def threads_share_a_bus(open_bus: OpenBus) -> None:
    """Four publishers at once: nothing lost, nothing twice, each one's own order kept."""
    bus = open_bus()

    def publish(writer: int) -> None:
        for number in range(50):
            bus.publish("a", b"%d-%d" % (writer, number), f"{writer}-{number}")

    threads = [threading.Thread(target=publish, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE_S)
    events, _ = drain(bus, "a")
    require_equal(len(events), 200, "number of events")
    for writer in range(4):
        mine = [event for event in events if event.startswith(b"%d-" % writer)]
        require_equal(mine, [b"%d-%d" % (writer, number) for number in range(50)], f"events of writer {writer}")


def a_closed_bus_says_so(open_bus: OpenBus) -> None:
    """Closing twice is fine, using it is not, and a poll that waits is woken up."""
    bus = open_bus()
    bus.publish("a", b"x", "id")
    _, cursor = drain(bus, "a")
    entered = threading.Event()
    found: list[object] = []

    def wait() -> None:
        entered.set()
        try:
            found.append(bus.poll("a", cursor, _PATIENCE_S))
        except ValueError:  # the bus was closed before the poll began
            found.append([])

    waiting = threading.Thread(target=wait)
    waiting.start()
    entered.wait(_PATIENCE_S)
    bus.close()
    bus.close()
    waiting.join(_PATIENCE_S / 2)
    require(not waiting.is_alive(), "poll still waits although the bus is closed")
    require_equal(found, [[]], "what the waiting poll returned")
    require_raises(ValueError, "publish on a closed bus", bus.publish, "a", b"x", "id-2")
    require_raises(ValueError, "poll of a closed bus", bus.poll, "a", None, 0.0)


BUS_RULES: Sequence[Callable[[OpenBus], None]] = (
    events_come_in_the_order_of_publication,
    an_event_id_is_taken_once_per_topic,
    a_cursor_resumes_exactly_behind_its_event,
    one_poll_returns_a_bounded_number,
    a_waiting_poll_returns_when_an_event_comes,
    a_poll_without_events_returns_nothing,
    bad_arguments_are_refused,
    threads_share_a_bus,
    a_closed_bus_says_so,
)
"""Every rule; parametrize a test with it."""
