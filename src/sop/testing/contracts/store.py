"""The contract of `sop.transport.base.ObjectStore`, one function per rule."""

import threading
from collections.abc import Callable, Sequence
from typing import cast

from sop.core.errors import AlreadyExists, NotFound
from sop.testing.contracts import require, require_equal, require_raises
from sop.transport.base import MAX_KEY_LENGTH, MapsObjects, ObjectStore

OpenStore = Callable[[], ObjectStore]
"""Opens the store under test; empty at the first call, the same place at every further one."""

BAD_KEYS = (
    "",
    "/absolute",
    "folder/",
    "a//b",
    "..",
    "a/../b",
    "a/./b",
    ".hidden",
    "a/.hidden",
    "with space",
    "back\\slash",
    "line\n",
    "nul\0",
    "umlaut-\u00e4",
    "a" * 300,
    "a/" * (MAX_KEY_LENGTH // 2) + "a",
)
"""Keys that every store refuses."""


def folders_are_named_once_and_in_order(open_store: OpenStore) -> None:
    """One level, whatever lies below it; an object is no folder."""
    store = open_store()
    for key in ("b/2/x", "b/10/x", "b/10/y/z", "b/object", "a/x", "b-c/x", "top"):
        store.put(key, b"1")
    require_equal(list(store.folders("b/")), ["10", "2"], "folders of b/")
    require_equal(list(store.folders("")), ["a", "b", "b-c"], "folders of the root")
    require_equal(list(store.folders("b/10/")), ["y"], "folders of b/10/")
    require_equal(list(store.folders("nothing/")), [], "folders of what is not there")
    for bad in ("b", "/", "../", ".hidden/"):
        require_raises(ValueError, f"folders({bad!r})", store.folders, bad)


def a_stored_object_is_read_back_whole(open_store: OpenStore) -> None:
    """What was put is what is got, from an empty object to all byte values, by any opener."""
    every_byte = bytes(range(256)) * 17
    objects: dict[str, bytes | memoryview] = {
        "empty": b"",
        "folder/every-byte": every_byte,
        "folder/view": memoryview(every_byte)[3:99],
    }
    store = open_store()
    for key, data in objects.items():
        store.put(key, data)
    for key, data in objects.items():
        require_equal(store.get(key), bytes(data), f"get({key!r})")
        require_equal(open_store().get(key), bytes(data), f"get({key!r}) after opening again")


def parts_become_one_object(open_store: OpenStore) -> None:
    """A list of parts is stored one behind the other, whether it has to be durable or not."""
    store = open_store()
    parts: list[bytes | memoryview] = [b"one", memoryview(b"-two-")[1:4], b"", memoryview(b"three")]
    store.put("parts/durable", parts)
    store.put("parts/passing", parts, durable=False)
    store.put("parts/none", [])
    for key, expected in (("durable", b"onetwothree"), ("passing", b"onetwothree"), ("none", b"")):
        require_equal(open_store().get(f"parts/{key}"), expected, f"get of {key}")
    require_raises(AlreadyExists, "put of parts over an object", store.put, "parts/none", parts)
    require_raises(TypeError, "put of text", store.put, "parts/text", ["text"])
    require_equal(len(list(store.keys("parts/"))), 3, "number of keys")


def an_object_is_created_once_and_never_replaced(open_store: OpenStore) -> None:
    """A second put says so and leaves the first object as it is, also when the bytes are the same."""
    store = open_store()
    store.put("a/key", b"first")
    require_raises(AlreadyExists, "put over other bytes", store.put, "a/key", b"second")
    require_raises(AlreadyExists, "put of the same bytes", open_store().put, "a/key", b"first")
    require_equal(store.get("a/key"), b"first", "the object after refused puts")


def a_span_reads_what_slicing_would(open_store: OpenStore) -> None:
    """Spans may be open, empty, or reach beyond the end; a step or anything negative is refused."""
    store = open_store()
    data = bytes(range(100))
    store.put("key", data)
    for span in (
        slice(0, 10),
        slice(10, None),
        slice(None, 7),
        slice(40, 41),
        slice(5, 5),
        slice(90, 200),
        slice(200, 300),
    ):
        require_equal(store.get("key", span), data[span], f"get({span})")
    for span in (slice(0, 10, 2), slice(-5, None), slice(0, -1), slice(9, 3)):
        require_raises(ValueError, f"get({span})", store.get, "key", span)


def a_missing_object_is_not_found(open_store: OpenStore) -> None:
    """Nothing under the key, a folder of keys, or something below an object: all the same."""
    store = open_store()
    store.put("folder/key", b"data")
    for key in ("nothing", "folder", "folder/other", "folder/key/below", "no/such/folder"):
        require_raises(NotFound, f"get({key!r})", store.get, key)


def bad_keys_are_refused_everywhere(open_store: OpenStore) -> None:
    """No method accepts what is not a key, and nothing is stored for it."""
    store = open_store()
    for key in BAD_KEYS:
        require_raises(ValueError, f"put({key!r})", store.put, key, b"x")
        require_raises(ValueError, f"get({key!r})", store.get, key)
        require_raises(ValueError, f"delete({key!r})", store.delete, key)
    for prefix in ("../", "a/../", "/a", "a//", ".tmp/", "\u00e4"):
        require_raises(ValueError, f"keys({prefix!r})", store.keys, prefix)
    require_equal(list(store.keys("")), [], "keys after refused puts")


def a_key_is_not_also_a_folder(open_store: OpenStore) -> None:
    """Stores differ in whether they could keep both, so none does."""
    store = open_store()
    store.put("a/b", b"x")
    require_raises(ValueError, "put of a folder's name", store.put, "a", b"x")
    require_raises(ValueError, "put below an object", store.put, "a/b/c", b"x")
    require_equal(list(store.keys("")), ["a/b"], "keys")


def keys_come_in_lexicographic_order(open_store: OpenStore) -> None:
    """Order of whole keys: `-` and `.` sort before `/`, digits and letters after it."""
    store = open_store()
    keys = ["a-b", "a.b", "a/b", "a/b-c/x", "a/b.c", "a/c/d", "a0", "aa/b", "A/z", "b", "a-/x", "a_/x"]
    for key in keys:
        store.put(key, b"x")
    require_equal(list(store.keys("")), sorted(keys), "keys('')")
    for after in [*keys, "a", "a/", "a/c", "", "0", "zzz"]:
        require_equal(list(store.keys("", after)), sorted(k for k in keys if k > after), f"keys('', after={after!r})")


def a_prefix_is_a_string_and_not_a_folder(open_store: OpenStore) -> None:
    """`robot1` finds `robot10`; a prefix that ends in `/` finds a folder."""
    store = open_store()
    for key in ("e/robot1/0", "e/robot10/0", "e/robot2/0", "e/robot1.json"):
        store.put(key, b"x")
    require_equal(list(store.keys("e/robot1")), ["e/robot1.json", "e/robot1/0", "e/robot10/0"], "keys('e/robot1')")
    require_equal(list(store.keys("e/robot1/")), ["e/robot1/0"], "keys('e/robot1/')")
    require_equal(list(store.keys("e/robot1", "e/robot1/0")), ["e/robot10/0"], "keys('e/robot1', after)")
    require_equal(list(store.keys("e/robot2/0")), ["e/robot2/0"], "keys of a whole key")
    require_equal(list(store.keys("f/")), [], "keys of a folder that does not exist")


def deleting_is_idempotent(open_store: OpenStore) -> None:
    """A deleted object is gone for everybody; deleting nothing is fine; the neighbours stay."""
    store = open_store()
    store.put("a/b", b"x")
    store.put("a/c", b"y")
    for key in ("a/b", "a/b", "a", "never/was", "a/c/below"):
        store.delete(key)
    require_raises(NotFound, "get of a deleted object", open_store().get, "a/b")
    require_equal(list(store.keys("")), ["a/c"], "keys after deleting")


def one_of_many_racing_writers_wins(open_store: OpenStore) -> None:
    """Eight threads create the same key at once: one succeeds, and the object is that one's, whole."""
    store = open_store()
    writers = 8
    for attempt in range(5):
        key = f"race/{attempt}"
        start = threading.Barrier(writers)
        winners: list[int] = []

        def write(writer: int, key: str = key, start: threading.Barrier = start, winners: list[int] = winners) -> None:
            start.wait(30)
            try:
                store.put(key, bytes([writer]) * 200_000)
            except AlreadyExists:
                return
            winners.append(writer)

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        require(len(winners) == 1, f"{len(winners)} writers of {key} were told that they won")
        require(store.get(key) == bytes([winners[0]]) * 200_000, f"{key} is not what its winner wrote")


def _map(store: ObjectStore, key: str) -> memoryview:
    require(isinstance(store, MapsObjects), f"{type(store).__name__} has no method map")
    return cast("MapsObjects", store).map(key)


def a_mapped_object_is_what_get_gives(open_store: OpenStore) -> None:
    """The same bytes, from an empty object on, by any opener, and nobody can change them through the map."""
    store = open_store()
    for number, data in enumerate((b"", b"x", bytes(range(256)) * 100)):
        store.put(f"mapped/{number}", data)
        view = _map(open_store(), f"mapped/{number}")
        require_equal((bytes(view), view.readonly), (data, True), f"map of {len(data)} bytes")
        require_equal((view.format, view.ndim), ("B", 1), "format of a map")


def a_map_outlives_its_object(open_store: OpenStore) -> None:
    """Deleting the object, as retention does, changes nothing for who has mapped it."""
    store = open_store()
    store.put("mapped/old", bytes(range(256)) * 100)
    part = _map(store, "mapped/old")[1000:]
    store.delete("mapped/old")
    store.put("mapped/old", b"new")
    require_equal(bytes(part), (bytes(range(256)) * 100)[1000:], "a map of a deleted object")


def nothing_cannot_be_mapped(open_store: OpenStore) -> None:
    """A missing object is not found, a bad key is refused."""
    store = open_store()
    store.put("mapped/key", b"x")
    for key in ("mapped", "mapped/other", "mapped/key/below"):
        require_raises(NotFound, f"map({key!r})", _map, store, key)
    for key in BAD_KEYS:
        require_raises(ValueError, f"map({key!r})", _map, store, key)


STORE_RULES: Sequence[Callable[[OpenStore], None]] = (
    a_stored_object_is_read_back_whole,
    folders_are_named_once_and_in_order,
    parts_become_one_object,
    an_object_is_created_once_and_never_replaced,
    a_span_reads_what_slicing_would,
    a_missing_object_is_not_found,
    bad_keys_are_refused_everywhere,
    a_key_is_not_also_a_folder,
    keys_come_in_lexicographic_order,
    a_prefix_is_a_string_and_not_a_folder,
    deleting_is_idempotent,
    one_of_many_racing_writers_wins,
)
"""Every rule; parametrize a test with it."""

MAP_RULES: Sequence[Callable[[OpenStore], None]] = (
    a_mapped_object_is_what_get_gives,
    a_map_outlives_its_object,
    nothing_cannot_be_mapped,
)
"""Every rule of `MapsObjects`, for stores that have it."""
