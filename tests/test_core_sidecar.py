"""Sidecars as bytes: exact, bounded, and refused when they are damaged or belong to another episode."""

import numpy as np
import pyarrow as pa
import pytest

from sop.core import sidecar as sidecars
from sop.core.errors import InvalidRecord
from sop.core.experience import Sidecar
from sop.core.layout import EpisodeKey, sidecar
from sop.core.sidecar import MAX_SIDECAR_BYTES, decode_sidecar, encode_sidecar

KEY = EpisodeKey("episodes", "robot-0", 3, 4, "0" * 32)
VALUES = np.asarray([-1.0, -0.25, np.nan, 0.0], np.float32)
GOOD = Sidecar(version=7, columns={"value": VALUES, "advantage": -VALUES})


def test_what_is_stored_comes_back_to_the_bit() -> None:
    found = decode_sidecar(encode_sidecar(GOOD, KEY), KEY)
    assert found.version == 7
    assert list(found.columns) == ["value", "advantage"]
    for name, column in GOOD.columns.items():
        np.testing.assert_array_equal(found.columns[name], column, strict=True)
    found.columns["value"][0] = 5


def test_the_place_says_algorithm_version_and_episode() -> None:
    assert sidecar("recap", 12, KEY.episode_id) == f"labels/recap/0012/{'0' * 32}.arrow"


def test_damaged_bytes_are_refused_or_are_still_a_sidecar_wherever_the_damage_is() -> None:
    good = encode_sidecar(GOOD, KEY)
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x41
        try:
            found = decode_sidecar(bytes(bad), KEY)
        except InvalidRecord:
            continue
        assert {column.shape for column in found.columns.values()} == {(4,)}
    for length in range(len(good) // 2):
        with pytest.raises(InvalidRecord):
            decode_sidecar(good[:length])


def test_another_episode_another_format_and_too_much_are_refused() -> None:
    good = encode_sidecar(GOOD, KEY)
    with pytest.raises(InvalidRecord, match="belongs to"):
        decode_sidecar(good, EpisodeKey("episodes", "robot-0", 4, 4, "1" * 32))
    with pytest.raises(InvalidRecord, match="this program reads 1"):
        decode_sidecar(good.replace(b'"sidecar_version":1', b'"sidecar_version":2'))
    with pytest.raises(InvalidRecord, match="its episode has 5"):
        decode_sidecar(good.replace(b"-00004-", b"-00005-"))
    with pytest.raises(InvalidRecord, match="at most"):
        decode_sidecar(bytes(MAX_SIDECAR_BYTES + 1))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"value": pa.array([1.0, 2.0, 3.0, 4.0], pa.float64())}, "not float32"),
        ({"value": pa.array([1.0, None, 3.0, 4.0], pa.float32())}, "empty cells"),
        ({"../x": pa.array(VALUES)}, "no proper name"),
        ({f"c{number}": pa.array(VALUES) for number in range(33)}, "33 columns"),
    ],
)
def test_columns_that_are_none_are_refused(arrays: dict[str, pa.Array], message: str) -> None:
    reader = pa.ipc.open_file(encode_sidecar(GOOD, KEY))
    schema = pa.schema([(name, array.type) for name, array in arrays.items()], metadata=reader.schema.metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(arrays.values()), schema=schema))
    with pytest.raises(InvalidRecord, match=message):
        decode_sidecar(sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    "columns", [{}, {"Value": VALUES}, {"value": VALUES[:3]}, {"value": VALUES.astype(np.float64)}]
)
def test_what_is_no_sidecar_is_not_written(columns: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="column"):
        encode_sidecar(Sidecar(version=0, columns=columns), KEY)
    assert sidecars.MAX_COLUMNS == 32
