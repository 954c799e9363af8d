"""One version up or down: what programs read of each other's episodes (fault 50)."""

from typing import Any

import msgspec
import pyarrow as pa
import pytest

from sop.core.codec import EncodedEpisode, Header, decode, encode
from sop.core.episode import SafetyCounts
from sop.core.errors import InvalidRecord
from sop.testing.episodes import make_episode

HEADER, YOUNGER = b"sop.episode", b"sop.episode.younger"


def with_metadata(data: bytes, **entries: Any) -> bytes:
    """The same episode with other entries in its schema: JSON values, None removes one."""
    batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
    metadata = dict(batch.schema.metadata)
    for name, value in entries.items():
        key = b"sop.episode" + (b"" if name == "header" else b".younger")
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = msgspec.json.encode(value)
    schema = batch.schema.with_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def entries(data: bytes) -> dict[bytes, Any]:
    metadata = pa.ipc.open_file(pa.BufferReader(data)).schema.metadata
    return {key: msgspec.json.decode(value) for key, value in metadata.items()}


COUNTS = SafetyCounts(clamped=3, nonfinite=1, stops=1, late=2)


def test_what_the_gate_counted_survives_the_codec() -> None:
    data = encode(make_episode(safety=COUNTS))
    assert decode(data).safety == COUNTS
    assert EncodedEpisode(data).header.safety == COUNTS


def test_fault_50_an_episode_of_an_older_program_is_read() -> None:
    data = encode(make_episode())
    assert set(entries(data)) == {HEADER}
    assert "safety" not in entries(data)[HEADER], "an episode without counts is byte for byte that of before"
    assert decode(data).safety is None


def test_fault_50_an_older_program_reads_the_episode_of_a_newer_one() -> None:
    """The program of before refuses unknown fields of the header, and looks at no other entry of the schema."""
    fields = [name for name in Header.__struct_fields__ if name != "safety"]
    assert set(entries(encode(make_episode(safety=COUNTS)))[HEADER]) == set(fields)


def test_fault_50_fields_that_this_program_does_not_know_are_ignored() -> None:
    data = encode(make_episode(safety=COUNTS))
    header, younger = entries(data)[HEADER], entries(data)[YOUNGER]
    newer = with_metadata(data, header=header | {"mood": "good"}, younger=younger | {"weather": [1, 2]})
    assert decode(newer).safety == COUNTS
    assert decode(newer).task == "push"


def test_fault_50_another_schema_is_refused_with_both_versions() -> None:
    data = encode(make_episode())
    header = entries(data)[HEADER] | {"schema_version": 2, "outcome": "splendid"}
    with pytest.raises(InvalidRecord, match="reads 1, got 2"):
        decode(with_metadata(data, header=header))


@pytest.mark.parametrize(
    "younger", [{"safety": {"clamped": -1}}, {"safety": {"clamped": "3"}}, {"safety": 7}, [1], "x", {"safety": [[]]}]
)
def test_counts_that_make_no_sense_are_refused(younger: Any) -> None:
    with pytest.raises(InvalidRecord):
        decode(with_metadata(encode(make_episode(safety=COUNTS)), younger=younger))


def test_a_header_nested_without_end_is_refused() -> None:
    data = encode(make_episode(safety=COUNTS))
    batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
    for key in (HEADER, YOUNGER):
        schema = batch.schema.with_metadata(dict(batch.schema.metadata) | {key: b"[" * 200_000})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(batch.columns, schema=schema))
        with pytest.raises(InvalidRecord):
            decode(sink.getvalue().to_pybytes())


@pytest.mark.parametrize("field", ["clamped", "nonfinite", "stops", "late"])
def test_a_count_below_zero_is_refused_by_name(field: str) -> None:
    with pytest.raises(InvalidRecord, match=f"safety.{field}"):
        SafetyCounts(**{field: -1})
