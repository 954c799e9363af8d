"""The order of listings, and servers that do not keep theirs."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sop.core.errors import StoreUnavailable
from sop.transport import cloud_listing
from sop.transport.cloud_listing import in_order, offset_for

PARTS = st.text("ab0-.", min_size=1, max_size=3).filter(lambda part: not part.startswith("."))
KEYS = st.lists(PARTS, min_size=1, max_size=3).map("/".join)


def _flat(keys: set[str], folder: str, offset: str | None) -> list[str]:
    """What Amazon answers."""
    return sorted(key for key in keys if key.startswith(folder) and (offset is None or key > offset))


def _by_folder(keys: set[str], folder: str, offset: str | None) -> list[str]:
    """What a server that keeps folders answers: a name and all below it come before the names that continue it."""
    found = [key for key in keys if key.startswith(folder)]
    if offset is not None:
        found = [key for key in found if key.split("/") > offset.split("/") and not key.startswith(f"{offset}/")]
    return sorted(found, key=lambda key: key.split("/"))


def _no_folder_is_a_key(keys: set[str]) -> set[str]:
    return {key for key in keys if not any(other.startswith(f"{key}/") for other in keys)}


@settings(deadline=None, max_examples=300)
@given(st.sets(KEYS, max_size=20).map(_no_folder_is_a_key), KEYS, st.integers(0, 8), KEYS | st.just("") | st.just("a/"))
def test_the_answer_is_in_order_and_complete_whatever_the_order_of_the_server(
    keys: set[str], key: str, cut: int, after: str
) -> None:
    for prefix in (key[:cut], ""):
        expected = sorted(k for k in keys if k.startswith(prefix) and k > after)
        folder = prefix[: prefix.rfind("/") + 1]
        for answer in (_flat, _by_folder):
            listed = answer(keys, folder, offset_for(prefix, after))
            assert list(in_order(listed, prefix, after, "server")) == expected, answer.__name__


def test_the_offset_is_close_to_the_key_after_which_one_lists() -> None:
    assert offset_for("episodes/robot-1/", "episodes/robot-1/0000027-5-abc.arrow") == "episodes/robot-1/000002"
    assert offset_for("policies/", "policies/00000017/manifest.json") == "policies/00000017/manifes"
    assert offset_for("demonstrations/lab", "") == "demonstrations/la"
    assert offset_for("episodes/", "") is None
    assert offset_for("b/", "c/key") is None, "nothing in the folder is after it"


def test_a_listing_is_read_no_further_than_its_prefix() -> None:
    def listed() -> Iterator[str]:
        yield from ("e/a", "e/robot1/0", "e/robot10/0", "e/s")
        raise AssertionError("read on behind the prefix")

    assert list(in_order(listed(), "e/robot1", "", "server")) == ["e/robot1/0", "e/robot10/0"]


def test_keys_that_others_made_are_left_out_with_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = list(in_order(["a/.hidden", "a/b", "a/folder/", "a/um\u00e4", "b"], "", "", "server"))
    assert found == ["a/b", "b"]
    assert len(caplog.records) == 3
    assert "'a/.hidden'" in caplog.text


@pytest.mark.parametrize("listed", [["b", "a"], ["a", "a"], ["a/b", "a/b", "a/b"], ["a/c", "a/b"], ["a0/x", "a/x"]])
def test_a_listing_without_order_is_refused(listed: list[str]) -> None:
    with pytest.raises(StoreUnavailable, match="must list in order"):
        list(in_order(listed, "", "", "server"))


def test_a_folder_without_end_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_listing, "MAX_HELD_KEYS", 100)
    read: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            read.append(1)
            yield f"a/{len(read):09d}"

    with pytest.raises(StoreUnavailable, match="more than 100 keys below ''"):
        list(in_order(endless(), "", "", "server"))
    assert len(read) == 101
