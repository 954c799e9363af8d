"""What an episode refuses, and that it comes back from bytes as it went in."""

import contextlib

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sop.core.codec import EncodedEpisode, content_hash, decode, encode
from sop.core.episode import Intervention, Outcome, PolicyTimes, human_runs
from sop.core.errors import InvalidRecord
from sop.core.layout import EpisodeKey
from sop.testing.episodes import make_episode


@pytest.mark.parametrize(
    ("field", "change", "step"),
    [
        ("state", lambda e: np.where(np.arange(4)[:, None] == 2, np.nan, e.state).astype(np.float32), 2),
        ("action", lambda e: np.where(np.arange(4)[:, None] == 1, np.inf, e.action).astype(np.float32), 1),
        ("policy_action", lambda e: np.full_like(e.policy_action, np.nan), 0),
        ("controller", lambda e: np.asarray([0, 0, 0, 9], np.uint8), 3),
        ("monotonic_ns", lambda e: np.asarray([0, 5, 5, 9], np.int64), 2),
        ("monotonic_ns", lambda e: np.asarray([0, 5, 9, 1], np.int64), 3),
        ("state", lambda e: e.state[:3], None),
        ("state", lambda e: e.state.astype(np.float64), None),
        ("action", lambda e: e.action[:, 0], None),
        ("policy_action", lambda e: e.policy_action[:, :1], None),
        ("images.front", lambda e: {"front": e.images["front"][:, :, :, :1]}, None),
        ("end_utc_ns", lambda e: 0, None),
        ("actor_id", lambda e: "../evil", None),
        ("sequence", lambda e: -1, None),
        ("schema_version", lambda e: 99, None),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_step(field, change, step) -> None:
    good = make_episode("pppp")
    with pytest.raises(InvalidRecord) as refusal:
        make_episode("pppp", **{field.split(".")[0]: change(good)})
    assert refusal.value.field == field
    assert refusal.value.step == step
    assert field in str(refusal.value)


def test_intervention_marks_have_to_be_the_human_runs() -> None:
    with pytest.raises(InvalidRecord, match="interventions"):
        make_episode("pphh", interventions=())
    with pytest.raises(InvalidRecord, match="interventions"):
        make_episode("phph", interventions=(Intervention(1, 4, "a", "b"),))


def test_a_policy_cannot_drive_a_demonstration() -> None:
    with pytest.raises(InvalidRecord, match=r"controller at step 1"):
        make_episode("hph", policy_version=None)


def test_arrays_of_an_episode_cannot_be_changed() -> None:
    episode = make_episode()
    with pytest.raises(ValueError, match="read-only"):
        episode.action[0, 0] = 5


def test_human_runs_are_maximal_and_ordered() -> None:
    assert human_runs(make_episode("hpphhph").controller) == [(0, 1), (3, 5), (6, 7)]


def test_every_field_survives_the_codec() -> None:
    times = PolicyTimes(published_utc_ns=1, staged_utc_ns=2, swapped_utc_ns=3)
    changes = {"outcome": Outcome.FAILURE, "truncated": True, "sequence": 7, "policy_times": times}
    episode = make_episode("pphhp", instruction="öffne die Tür", **changes)
    again = decode(encode(episode))
    for name in ("state", "action", "policy_action", "proposed", "controller", "monotonic_ns"):
        np.testing.assert_array_equal(getattr(again, name), getattr(episode, name))
        assert getattr(again, name).dtype == getattr(episode, name).dtype
    for name in (*changes, "instruction", "interventions", "policy_version", "task"):
        assert getattr(again, name) == getattr(episode, name)
    difference = again.images["front"].astype(int) - episode.images["front"].astype(int)
    assert np.abs(difference).max() <= 2


def test_equal_episodes_have_equal_ids_and_any_change_another_one() -> None:
    data = encode(make_episode())
    assert content_hash(data) == content_hash(encode(make_episode()))
    assert content_hash(data) != content_hash(encode(make_episode(task="pull")))


def test_an_encoded_episode_gives_single_frames_without_the_others() -> None:
    encoded = EncodedEpisode(encode(make_episode("pppp")))
    assert abs(int(encoded.frame("front", 3).mean()) - 15) <= 1
    assert encoded.frame("front", 3).shape == (16, 16, 3)
    with pytest.raises(InvalidRecord, match="no such camera"):
        encoded.frame("back", 0)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_refused_and_never_crash(data: st.DataObject) -> None:
    good = bytearray(encode(make_episode("pphp")))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(good) - 1))
        good[position] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(len(good) // 2, len(good)))
    with contextlib.suppress(InvalidRecord):  # a flip in padding or in a pixel may go unseen here: the hash sees it
        decode(bytes(good[:cut]))


def test_a_frame_that_is_not_a_jpeg_is_refused_with_its_step() -> None:
    data = bytearray(encode(make_episode("pppp")))
    positions = [i for i in range(len(data) - 2) if data[i : i + 3] == b"\xff\xd8\xff"]
    data[positions[2]] = 0
    with pytest.raises(InvalidRecord) as refusal:
        decode(bytes(data))
    assert (refusal.value.field, refusal.value.step) == ("images.front", 2)


def test_an_arrow_file_that_is_no_episode_is_refused() -> None:
    sink = pa.BufferOutputStream()
    table = pa.record_batch({"state": pa.array([1.0])})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(table)
    with pytest.raises(InvalidRecord, match="header is missing"):
        decode(sink.getvalue().to_pybytes())


def test_a_header_of_another_schema_is_refused_with_both_versions() -> None:
    batch = pa.ipc.open_file(pa.BufferReader(encode(make_episode()))).get_batch(0)
    header = msgspec.json.decode(batch.schema.metadata[b"sop.episode"]) | {"schema_version": 2}
    schema = batch.schema.with_metadata({b"sop.episode": msgspec.json.encode(header)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    with pytest.raises(InvalidRecord, match="reads 1, got 2"):
        decode(sink.getvalue().to_pybytes())


def test_the_key_of_an_episode_says_everything_and_orders_like_its_number() -> None:
    keys = [EpisodeKey("episodes", "robot-0", number, 12, "a" * 32) for number in (2, 10, 100)]
    assert [EpisodeKey.parse(str(key)) for key in keys] == keys
    assert sorted(map(str, keys)) == [str(key) for key in keys]
    for bad in ("episodes/a/b.arrow", "episodes/../00000001-00012-" + "a" * 32 + ".arrow", "run.json"):
        with pytest.raises(InvalidRecord, match="not the key"):
            EpisodeKey.parse(bad)
