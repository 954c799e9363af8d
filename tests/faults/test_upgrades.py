"""One version up or down: fields that a neighbouring version adds are read over, another schema is refused in words."""

import msgspec
import pytest

from broadcast_examples import as_json, policy
from sop.broadcast.manifest import SCHEMA_VERSION, PolicyManifest
from sop.core.errors import InvalidRecord
from sop.core.events import ActorReported, EpisodeCommitted, PolicyPublished, decode_event, encode_event
from sop.places import Place, find_place, keep_place

EVENTS = [
    EpisodeCommitted(key="k", outcome="success", ended_utc_ns=1, committed_utc_ns=2),
    PolicyPublished(version=3, manifest="m", published_utc_ns=4),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_fault_50_events_and_manifests_with_unknown_fields_are_read(event: EpisodeCommitted | PolicyPublished) -> None:
    newer = msgspec.json.decode(encode_event(event)) | {"of_tomorrow": {"any": [1, 2]}}
    assert decode_event(msgspec.json.encode(newer), type(event)) == event
    manifest, _ = policy(7)
    tomorrow = as_json(manifest) | {"of_tomorrow": 1}
    assert PolicyManifest.from_json(msgspec.json.encode(tomorrow)) == manifest


def test_fault_50_a_report_of_before_the_gate_counted_is_read() -> None:
    report = ActorReported(
        actor_id="robot-0", state="acting", task="push", policy_version=1, newest_version=1, episodes=1, successes=1,
        interventions=0, human_steps=0, steps=9, spooled=0, overruns=0, gated=2, nonfinite=1, stops=1, problem="",
        utc_ns=5,
    )  # fmt: skip
    older = {
        name: value
        for name, value in msgspec.json.decode(encode_event(report)).items()
        if name not in ("gated", "nonfinite", "stops")
    }
    read = decode_event(msgspec.json.encode(older), ActorReported)
    assert (read.gated, read.nonfinite, read.stops, read.steps) == (0, 0, 0, 9)


def test_fault_50_a_manifest_of_another_schema_is_refused_with_both_numbers() -> None:
    manifest, _ = policy(7)
    other = as_json(manifest) | {"schema_version": SCHEMA_VERSION + 1}
    with pytest.raises(InvalidRecord, match=rf"{SCHEMA_VERSION}.*{SCHEMA_VERSION + 1}"):
        PolicyManifest.from_json(msgspec.json.encode(other))


def test_fault_50_a_place_of_a_newer_program_is_found(tmp_path) -> None:
    keep_place(tmp_path, Place(store="s3://b/r", bus="nats://127.0.0.1:1/n"))
    path = tmp_path / "place.json"
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | {"region_of_tomorrow": "x"}))
    assert find_place(str(tmp_path)).store == "s3://b/r"
