"""Episodes that are altered, hostile or unfit: refused or flagged with the reason, and the next one gets in."""

import struct
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import simplejpeg

from hostile_examples import RUN, STEPS, altered, good, long_episode, put, refusal
from recovery_times import Recovery, ingest_until, seconds_of
from sop.buffer import Ingest
from sop.buffer.screening import SIMULATED, Flag, Rule, Screening, decode_note, notes, screen
from sop.core import layout
from sop.core.codec import EncodedEpisode, content_hash, encode
from sop.core.episode import Outcome, SafetyCounts
from sop.core.errors import InvalidRecord
from sop.core.events import TOPIC_EPISODES, EpisodeCommitted, encode_event
from sop.core.layout import EpisodeKey
from sop.testing.clock import FakeClock
from sop.testing.episodes import TOY_BODY, make_episode
from sop.testing.memory import MemoryBus, MemoryStore


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_bytes_are_refused_counted_and_the_true_ones_get_in(damage: str) -> None:
    """Fault 6: upload truncated or a bit flipped: hash mismatch, rejected, counted; the robot sends it again."""
    store, data = MemoryStore(), good(0)
    key = str(EpisodeKey(layout.EPISODES, "robot-0", 0, STEPS, content_hash(data)))
    store.tamper(key, data[:-40] if damage == "truncated" else data[:700] + bytes([data[700] ^ 1]) + data[701:])
    ingest = Ingest(store, MemoryBus(), RUN)
    assert ingest.reconcile() == 0
    assert ingest.num_quarantined == 1
    assert "the bytes hash to" in ingest.quarantined[key]
    store.tamper(key, data)
    restarted = Ingest(store, MemoryBus(), RUN)
    assert restarted.reconcile() == 1


def test_a_thousand_events_index_an_episode_once() -> None:
    """Fault 7: duplicate event x1000: one index entry."""
    store, bus = MemoryStore(), MemoryBus()
    key = put(store, good(0))
    event = encode_event(EpisodeCommitted(key=key, outcome="success", ended_utc_ns=0, committed_utc_ns=0))
    for number in range(1000):
        bus.publish(TOPIC_EPISODES, event, event_id=str(number))
    ingest = Ingest(store, bus, RUN)
    while ingest.poll(0):
        pass
    assert [str(episode.key) for episode in ingest.drain()] == [key]


def test_events_in_any_order_or_lost_are_healed_by_one_listing(recovery: Recovery) -> None:
    """Fault 8: events out of order or lost: listed against the index; `list_every_s` is half a minute."""
    store, bus, clock = MemoryStore(), MemoryBus(), FakeClock()
    ingest = Ingest(store, bus, RUN, clock=seconds_of(clock))
    ingest.reconcile()
    keys = [put(store, good(number), sequence=number) for number in range(5)]
    for number in (4, 1):
        event = EpisodeCommitted(key=keys[number], outcome="success", ended_utc_ns=0, committed_utc_ns=0)
        bus.publish(TOPIC_EPISODES, encode_event(event), event_id=str(number))
    ingest.poll(0)
    assert ingest.missing() == {"robot-0": [range(1), range(2, 4)]}
    recovery.fault_is_over(seconds_of(clock))
    ingest_until(ingest, clock, lambda: ingest.missing() == {})
    recovery.whole("the learner has all")
    assert sorted(str(episode.key) for episode in ingest.drain()) == keys
    assert ingest.missing() == {}


def test_a_stale_listing_shows_a_gap_and_skips_nothing(recovery: Recovery) -> None:
    """Fault 12: the store returns a stale listing: the numbers show the gap, the next listing begins before it."""

    class StaleStore(MemoryStore):
        hidden: str | None = None

        def keys(self, prefix: str, after: str | None = None) -> Any:
            return (key for key in super().keys(prefix, after) if key != self.hidden)

    store = StaleStore()
    keys = [put(store, good(number), sequence=number) for number in range(3)]
    store.hidden = keys[1]
    clock = FakeClock()
    ingest = Ingest(store, MemoryBus(), RUN, clock=seconds_of(clock))
    ingest.reconcile()
    assert ingest.missing() == {"robot-0": [range(1, 2)]}
    store.hidden = None
    recovery.fault_is_over(seconds_of(clock))
    ingest_until(ingest, clock, lambda: ingest.missing() == {})
    recovery.whole("the learner has all")
    assert [str(episode.key) for episode in ingest.drain()] == [keys[0], keys[2], keys[1]]
    assert ingest.missing() == {}


def test_an_object_is_read_only_as_far_as_its_key_allows() -> None:
    """Fault 17: a 10 GB object under the key of 40 steps: two megabytes are asked for, then it is refused."""
    asked: list[int] = []

    class HugeStore(MemoryStore):
        def get(self, key: str, span: slice | None = None) -> bytes:
            assert span is not None
            asked.append(span.stop)
            return bytes(min(10 << 30, span.stop))

    store = HugeStore()
    key = put(store, b"x")
    ingest = Ingest(store, MemoryBus(), RUN)
    ingest.reconcile()
    assert asked[0] < 3 << 20
    assert "bytes for 40 steps" in ingest.quarantined[key]


def test_images_that_claim_to_be_huge_allocate_nothing() -> None:
    """Fault 17: 40 JPEGs of a few hundred bytes that would be 10 GB of pixels."""
    small = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8), 95)
    place = small.index(b"\xff\xc0") + 5
    huge = small[:place] + struct.pack(">HH", 9000, 9000) + small[place + 4 :]
    before = _peak_kb()
    reason = refusal(altered(good(0), {"image.front": lambda column: pa.array([huge] * len(column), pa.binary())}))
    assert "images.front at step 0" in reason
    assert _peak_kb() - before < 100 << 10


def test_nesting_zip_bombs_and_paths_are_refused_and_the_consumer_lives() -> None:
    """Fault 17: deep nesting, compressed columns, a path with `../`."""
    deep = altered(good(0))
    batch = pa.ipc.open_file(deep).get_batch(0)
    nested = batch.replace_schema_metadata({b"sop.episode": b"[" * 100_000})
    assert "header" in refusal(_file(nested))
    assert "compressed columns" in refusal(_file(pa.ipc.open_file(good(0)).get_batch(0), compression="zstd"))
    store, bus = MemoryStore(), MemoryBus()
    for number, key in enumerate(["episodes/robot-0/../../../etc/passwd", "/etc/passwd", "episodes/" + "a/" * 5000]):
        event = EpisodeCommitted(key=key, outcome="success", ended_utc_ns=0, committed_utc_ns=0)
        bus.publish(TOPIC_EPISODES, encode_event(event), event_id=str(number))
    fine = put(store, good(0))
    ingest = Ingest(store, bus, RUN)
    ingest.poll(0)
    ingest.reconcile()
    assert ingest.num_quarantined == 3
    assert [str(episode.key) for episode in ingest.drain()] == [fine]


def _with(column: pa.Array, step: int, value: float) -> pa.Array:
    values = np.asarray(column.flatten()).reshape(len(column), -1).copy()
    values[step, 0] = value
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _as_double(column: pa.Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(column.flatten().cast(pa.float64()), column.type.list_size)


def _wider(column: pa.Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3 * len(column), np.float32)), 3)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"state": lambda column: _with(column, 7, np.nan)}, "state at step 7: not finite"),
        ({"action": lambda column: _with(column, 9, np.inf)}, "action at step 9: not finite"),
        ({"state": _as_double}, "state: must be float32"),
        ({"state": _wider}, "state: got 3, expected 2"),
        ({"action": _wider, "policy_action": _wider}, "action: got 3, expected 2"),
        ({"action": lambda column: _with(column, 5, 57.3)}, "action at step 5: dx is 57.3, the robot takes -1 to 1"),
    ],
)
def test_wrong_numbers_are_refused_with_field_and_step(columns: Any, expected: str) -> None:
    """Fault 18: NaN, Inf, wrong dtype, wrong joint count, wrong unit."""
    assert expected in refusal(altered(good(0), columns))


def test_an_action_at_its_bound_is_no_other_unit() -> None:
    """Fault 18: rounding is not refused."""
    store = MemoryStore()
    put(store, altered(good(0), {"action": lambda column: _with(column, 5, 1.0005)}))
    assert Ingest(store, MemoryBus(), RUN).reconcile() == 1


def test_time_that_runs_backwards_is_refused() -> None:
    """Fault 19: timestamps not monotonic."""
    backwards = {"monotonic_ns": lambda column: pa.array(np.asarray(column)[::-1].copy())}
    assert "monotonic_ns at step 1: time does not run forwards" in refusal(altered(good(0), backwards))


def _times(gaps: dict[int, float], usual_s: float = 0.1) -> np.ndarray[Any, np.dtype[np.int64]]:
    intervals = np.full(STEPS, usual_s)
    for step, seconds in gaps.items():
        intervals[step] = seconds
    return np.cumsum(intervals * 1e9).astype(np.int64)


def _noise(frozen: slice | None = None, black: tuple[int, ...] = ()) -> dict[str, Any]:
    images = np.random.default_rng(0).integers(0, 255, (STEPS, 16, 16, 3), np.uint8)
    if frozen is not None:
        images[frozen] = images[frozen.start]
    images[list(black)] = np.random.default_rng(1).integers(0, 4, (len(black), 16, 16, 3), np.uint8)
    return {"front": images}


CASES = [
    ({"monotonic_ns": _times({3: 0.2, 20: 0.3})}, Rule.DROPPED_FRAMES, "3 of 43 steps are missing (7.0%)"),
    ({"images": _noise(frozen=slice(10, 20))}, Rule.FROZEN_CAMERA, "front: steps 10 to 19 show one image"),
    ({"images": _noise(black=(4, 30))}, Rule.BLACK_IMAGES, "front: 2 images or more are black, as that of step 4"),
    ({"safety": SafetyCounts(stops=1)}, Rule.SUCCESS_AFTER_STOP, "the safety gate made 1 stops"),
]


@pytest.mark.parametrize(("changes", "rule", "detail"), CASES)
def test_a_valid_but_unfit_episode_is_flagged_listed_and_kept(changes: dict[str, Any], rule: Rule, detail: str) -> None:
    """Fault 19: dropped frames, frozen camera, black image. Fault 25: success with a safety stop."""
    store = MemoryStore()
    key, fine = put(store, long_episode(**changes)), put(store, good(1), sequence=1)
    ingest = Ingest(store, MemoryBus(), RUN)
    ingest.reconcile()
    flagged, clean = ingest.drain()
    assert (str(flagged.key), str(clean.key), clean.flags) == (key, fine, ())
    assert [flag.rule for flag in flagged.flags] == [rule]
    assert detail in flagged.flags[0].detail
    assert (ingest.flagged, dict(ingest.flags), ingest.num_quarantined) == ({key}, {rule: 1}, 0)
    assert list(notes(store)) == [(key, flagged.flags)]
    again = Ingest(store, MemoryBus(), RUN)
    again.resume([])
    assert again.flagged == {key}


@pytest.mark.parametrize(
    "changes",
    [
        {"monotonic_ns": _times({3: 0.2, 20: 0.2})},
        {"monotonic_ns": _times({}, usual_s=0.25)},
        {"monotonic_ns": _times({3: 0.05}, usual_s=0.001)},
        {"images": _noise(frozen=slice(10, 19))},
        {"images": _noise(frozen=slice(10, 30)), "state": np.ones((STEPS, 2), np.float32)},
        {"images": _noise(black=(4,))},
        {"safety": SafetyCounts(stops=1), "outcome": Outcome.FAILURE},
        {"safety": SafetyCounts(clamped=9, late=3)},
    ],
)
def test_what_stays_within_the_rules_is_not_flagged(changes: dict[str, Any]) -> None:
    """Fault 19: a slow robot, an accelerated one, a robot that stands still, one dark frame."""
    assert screen(EncodedEpisode(long_episode(**changes)), TOY_BODY) == ()


def test_a_simulated_robot_is_excused_from_the_rules_of_real_time_and_real_cameras() -> None:
    """Fault 19: in a simulation nothing is dropped and still images are equal; black ones are black."""
    found = [screen(EncodedEpisode(long_episode(**changes)), TOY_BODY, SIMULATED) for changes, _, _ in CASES]
    assert [bool(flags) for flags in found] == [False, False, True, True]


def test_limits_and_notes_that_are_none_are_refused() -> None:
    for wrong in ({"max_dropped_share": 1.1}, {"black_share": 0.0}, {"frozen_s": 0.0}, {"black_level": -1.0}):
        with pytest.raises(ValueError, match="screening"):
            Screening(**wrong)
    for note in (b"{}", b"x" * (1 << 17), b"[" * 9000, b'{"key":"a","flags":[{"rule":"ugly","detail":""}]}'):
        with pytest.raises(InvalidRecord, match="screened"):
            decode_note(note)


def test_images_that_cannot_be_decoded_or_are_too_few_are_refused() -> None:
    """Fault 20: undecodable image, fewer images than steps; decoding allocates nothing by what the image says."""
    broken = {"image.front": lambda column: pa.array([b"\xff\xd8 no jpeg"] * len(column), pa.binary())}
    assert "images.front at step 0: not a readable JPEG" in refusal(altered(good(0), broken))
    missing = {"image.front": lambda column: pa.array([*column.to_pylist()[:-1], None], pa.binary())}
    assert "images.front: holds empty cells" in refusal(altered(good(0), missing))
    other = simplejpeg.encode_jpeg(np.zeros((32, 16, 3), np.uint8), 95)
    larger = {"image.front": lambda column: pa.array([*column.to_pylist()[:-1], other], pa.binary())}
    assert "images.front at step 39: (32, 16, 3) where (16, 16, 3)" in refusal(altered(good(0), larger))
    assert "controller: 40 steps, the key says 41" in refusal(good(0), steps=41)


@pytest.mark.parametrize(("field", "value"), [("task", "fly"), ("instruction", "push the red button")])
def test_an_unknown_task_or_prompt_is_stored_not_sampled_and_told(field: str, value: str) -> None:
    """Fault 24: unknown task id or prompt: the object stays, a note says why, the count goes into every report."""
    reason = refusal(long_episode(**{field: value}))
    assert reason.startswith(f"{field}: '{value}' is no")


def test_a_missing_outcome_is_refused() -> None:
    """Fault 25: label missing."""
    assert "header: " in refusal(altered(good(0), outcome=None))


def test_two_flags_are_both_named() -> None:
    both = {"monotonic_ns": _times({3: 0.9}), "images": _noise(black=(1, 2, 3))}
    assert [flag.rule for flag in screen(EncodedEpisode(long_episode(**both)), TOY_BODY)] == [
        Rule.DROPPED_FRAMES,
        Rule.BLACK_IMAGES,
    ]
    assert Flag(Rule.BLACK_IMAGES, "x") == msgspec.json.decode(b'{"rule":"black_images","detail":"x"}', type=Flag)


def test_an_episode_of_one_step_is_screened() -> None:
    assert screen(EncodedEpisode(encode(make_episode("p"))), TOY_BODY) == ()


def _file(batch: pa.RecordBatch, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def _peak_kb() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
