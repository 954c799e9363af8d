"""The cheapest way to a version: chains, keyframes, gaps, and manifests that lie about them."""

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadcast_examples import as_json, policy
from sop.broadcast.manifest import FULL, LINEAGE, PACKED, FileEntry, PolicyManifest, delta_key, keyframe_key
from sop.broadcast.plan import cheapest_way
from sop.core import layout
from sop.core.errors import InvalidRecord

NO_HASH = "0" * 32


def delta(version: int, base: int, size: int = 20) -> FileEntry:
    return FileEntry(delta_key(version, base), size, NO_HASH, PACKED, base)


def keyframe(version: int, size: int = 70) -> FileEntry:
    return FileEntry(keyframe_key(version), size, NO_HASH, PACKED)


def full(version: int, size: int = 100) -> FileEntry:
    return FileEntry(layout.policy_weights(version), size, NO_HASH, FULL)


class Roads:
    """What a plan looks at of a manifest; sizes need not fit tensors here."""

    def __init__(self, version: int, files: Iterable[FileEntry]) -> None:
        self.version = version
        self.files = tuple(file for file in files if file.version == version)
        self.history = tuple(file for file in files if file.version != version)


def plan(files: list[FileEntry], held: int | None, **options: Any) -> list[str] | None:
    roads: Any = Roads(max(file.version for file in files), files)
    way = cheapest_way(roads, held, options.pop("cost", lambda file: file.num_bytes), **options)
    return None if way is None else [file.key.split("/", 1)[1].removesuffix(".packed") for file in way]


CHAIN = [keyframe(4), *(delta(version, version - 1) for version in range(5, 9)), keyframe(8)]


@pytest.mark.parametrize(
    ("held", "way"),
    [
        (7, ["00000008/delta-00000007"]),
        (5, ["00000006/delta-00000005", "00000007/delta-00000006", "00000008/delta-00000007"]),
        (4, ["00000008/keyframe"]),  # four deltas cost more
        (3, ["00000008/keyframe"]),  # its history is not listed any more
        (None, ["00000008/keyframe"]),
        (9, ["00000008/keyframe"]),  # going back builds on nothing
        (8, ["00000008/keyframe"]),
    ],
)
def test_a_robot_takes_what_costs_least_from_what_it_holds(held: int | None, way: list[str]) -> None:
    assert plan(CHAIN, held) == way


def test_a_late_joiner_takes_the_newest_keyframe_and_its_tail() -> None:
    files = CHAIN[:-2]
    assert plan(files, None) == ["00000004/keyframe", *(f"{v:08d}/delta-{v - 1:08d}" for v in (5, 6, 7))]
    assert plan(files, 6) == ["00000007/delta-00000006"]


def test_a_full_form_that_is_mapped_costs_nothing() -> None:
    files = [*CHAIN, full(8)]
    assert plan(files, 7) == ["00000008/delta-00000007"]
    assert plan(files, 7, cost=lambda file: 0 if file.encoding == FULL else file.num_bytes) == [
        "00000008/weights.safetensors"
    ]


def test_a_gap_in_the_numbers_and_a_skipped_version_are_bridged() -> None:
    files = [keyframe(1), delta(4, 1), delta(5, 4), delta(9, 4, 30), delta(9, 5)]
    assert plan(files, 4) == ["00000009/delta-00000004"]
    assert plan(files, 5) == ["00000009/delta-00000005"]
    assert plan(files, 2) == ["00000001/keyframe", "00000004/delta-00000001", "00000009/delta-00000004"]


def test_what_is_missing_or_unknown_is_gone_around() -> None:
    without = {delta_key(8, 7)}
    assert plan(CHAIN, 7, without=without) == ["00000008/keyframe"]
    assert plan(CHAIN, 7, without=without | {keyframe_key(8)}) is None
    newer = FileEntry(f"{layout.policy_folder(8)}/x.newer", 1, NO_HASH, "newer")
    assert plan([*CHAIN, newer], 7) == ["00000008/delta-00000007"]


def test_a_chain_that_hangs_in_the_air_leads_nowhere() -> None:
    assert plan([delta(8, 7), delta(7, 6)], None) is None
    assert plan([delta(8, 7), delta(7, 6)], 6) == ["00000007/delta-00000006", "00000008/delta-00000007"]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7), st.integers(1, 9)), max_size=14),
    st.none() | st.integers(0, 6),
)
def test_no_other_way_is_cheaper(roads: list[tuple[int, int, int]], held: int | None) -> None:
    """Compared with trying all ways."""
    files = {keyframe(7, 40).key: keyframe(7, 40)}
    for base, version, size in roads:
        if base < version:
            files[delta_key(version, base)] = delta(version, base, size)
        else:
            files[keyframe_key(version)] = keyframe(version, size)

    def best(version: int) -> float:
        if version == held:
            return 0
        ways = [file for file in files.values() if file.version == version]
        return min((f.num_bytes + (0 if f.base is None else best(f.base)) for f in ways), default=float("inf"))

    found = cheapest_way(Roads(7, files.values()), held, lambda file: file.num_bytes)  # type: ignore[arg-type]
    assert found is not None
    assert sum(file.num_bytes for file in found) == best(7)
    assert [file.base for file in found[1:]] == [file.version for file in found[:-1]]
    assert found[0].base in (None, held)


def test_a_graph_with_two_to_the_hundred_ways_is_planned_at_once() -> None:
    files = [keyframe(0)]
    for version in range(1, 101):
        files += [delta(version, version - 1), delta(version, max(0, version - 2), 20 + version)]
    assert len(plan(files, 0) or ()) == 90, "the ten first steps of two cost no more than two steps of 20"


def history(**fields: Any) -> dict[str, Any]:
    entry: dict[str, Any] = msgspec.to_builtins(delta(2, 1))
    return entry | fields


BAD_HISTORY: list[tuple[str, Any, str]] = [
    ("history", [history(key="policies/00000003/delta-00000002.packed")], "history[0].key: must be inside the folder"),
    ("history", [history(key="policies/00000009/x")], "history[0].key: must be inside the folder"),
    ("history", [history(key="episodes/robot-1/secret")], "history[0].key"),
    ("history", [history(key="policies/00000002/../../secret")], "history[0].key"),
    ("history", [history(key="policies/00000002/.hidden")], "history[0].key"),
    ("history", [history(key="policies/00000002/")], "history[0].key"),
    ("history", [history(base=2)], "history[0].base: must be before version 2, got 2"),
    ("history", [history(base=-1)], "history[0].base: must be before version 2"),
    ("history", [history(num_bytes=1 << 40)], "history[0].num_bytes: must be in [1, 66303]"),
    ("history", [history(num_bytes=0)], "history[0].num_bytes"),
    ("history", [history(hash="x")], "history[0].hash"),
    ("history", [history(names=["body.weight", "other"])], "history[0].names: must be one or more of the manifest's"),
    ("history", [history(names=[])], "history[0].names"),
    ("history", [history(), history()], "files: two entries have the same key"),
    ("history", [history(encoding="full")], "history[0].base: encoding 'full' stands alone, got base 1"),
    ("history", [history(key=f"policies/00000002/{n}") for n in range(257)], "history: must have up to 256"),
    ("files", [msgspec.to_builtins(delta(3, 3))], "files[0].base: must be before version 3"),
    ("files", [msgspec.to_builtins(full(3, 67))] * 17, "files: must have 1 to 16 entries, got 17"),
    ("lineage", msgspec.to_builtins(delta(3, 2)), "lineage.encoding: must be 'lineage', got 'packed'"),
    ("lineage", msgspec.to_builtins(FileEntry("policies/00000002/l", 1, NO_HASH, LINEAGE)), "lineage.key"),
    ("lineage", msgspec.to_builtins(FileEntry("policies/00000003/l", 1 << 40, NO_HASH, LINEAGE)), "lineage.num_bytes"),
]


@pytest.mark.parametrize(("field", "value", "reason"), BAD_HISTORY)
def test_a_hostile_list_of_forms_is_refused_by_name(field: str, value: Any, reason: str) -> None:
    plain = as_json(policy(3)[0]) | {field: value}
    with pytest.raises(InvalidRecord) as caught:
        PolicyManifest.from_json(msgspec.json.encode(plain))
    assert reason in str(caught.value)


@pytest.mark.parametrize(("version", "origin"), [(0, 0), (3, 1), (3, 3), (3, -1)])
def test_only_the_base_is_an_origin(version: int, origin: int) -> None:
    plain = as_json(policy(version)[0])
    plain["tensors"]["steps"]["origin"] = origin
    with pytest.raises(InvalidRecord, match=r"tensors\['steps'\]\.origin: must be none or the base, version 0"):
        PolicyManifest.from_json(msgspec.json.encode(plain))


def test_a_version_that_is_the_base_has_no_files_and_another_one_has() -> None:
    plain = as_json(policy(3)[0])
    for entry in plain["tensors"].values():
        entry["origin"] = 0
    with pytest.raises(InvalidRecord, match="files: must have no entry, all tensors are the base's, got 1"):
        PolicyManifest.from_json(msgspec.json.encode(plain))
    assert PolicyManifest.from_json(msgspec.json.encode(plain | {"files": []})).own == {}
