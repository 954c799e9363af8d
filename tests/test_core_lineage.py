"""What a policy version learned from: the stored form, merging, and refusal of what is damaged."""

from dataclasses import replace

import numpy as np
import pytest
import zstandard

from sop.core.errors import InvalidRecord
from sop.core.lineage import MAX_LINEAGE_BYTES, LearnedEpisode, Lineage, StepDraw


def key(number: int, actor: str = "robot-1") -> str:
    return f"episodes/{actor}/{number:08d}-00120-{number:032x}.arrow"


def draw(step: int, *episodes: int) -> StepDraw:
    return StepDraw(
        learner_step=step,
        keys=tuple(key(number) for number in episodes),
        starts=np.arange(len(episodes), dtype=np.int32) + step,
        batch_hash=f"{step:032x}",
    )


def learned(number: int) -> LearnedEpisode:
    return LearnedEpisode(
        key=key(number),
        task="door-open",
        policy_version=3,
        human_steps=7,
        operators=("anna", "bert"),
        learner_step=27,
        recorded_utc_ns=10,
        uploaded_utc_ns=12,
        indexed_utc_ns=13,
        sampled_utc_ns=14,
    )


def same(left: StepDraw, right: StepDraw) -> bool:
    facts = [(item.learner_step, item.keys, item.starts.tolist(), item.batch_hash) for item in (left, right)]
    return facts[0] == facts[1]


def test_the_stored_form_keeps_every_draw_in_order() -> None:
    lineage = Lineage(draws=(draw(26, 1, 2, 1), draw(27, 2), draw(28, 9, 1)), learned=(learned(2), learned(9)))
    found = Lineage.decode(lineage.encode())
    assert found.learned == lineage.learned
    assert len(found.draws) == 3
    assert all(same(one, two) for one, two in zip(found.draws, lineage.draws, strict=True))


def test_a_version_without_a_step_has_an_empty_lineage() -> None:
    assert Lineage.decode(Lineage(draws=(), learned=()).encode()) == Lineage(draws=(), learned=())


def test_two_lineages_follow_each_other_when_the_version_between_was_skipped() -> None:
    older, newer = Lineage(draws=(draw(1, 5),), learned=(learned(5),)), Lineage(draws=(draw(2, 6),), learned=())
    both = Lineage.decode(older.followed_by(newer).encode())
    assert [item.learner_step for item in both.draws] == [1, 2]
    assert both.learned == (learned(5),)


def test_a_step_is_found_by_its_number_and_draws_are_counted_per_episode() -> None:
    lineage = Lineage(draws=(draw(1, 5, 5, 6), draw(2, 5)), learned=())
    found = lineage.draw(2)
    assert found is not None
    assert found.keys == (key(5),)
    assert lineage.draw(3) is None
    assert (lineage.draws_of(key(5)), lineage.draws_of(key(6)), lineage.draws_of(key(7))) == (3, 1, 0)


def test_damaged_bytes_are_refused_wherever_the_damage_is() -> None:
    good = Lineage(draws=(draw(1, 5, 6), draw(2, 5)), learned=(learned(5),)).encode()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x41
        try:
            found = Lineage.decode(bytes(bad))
        except InvalidRecord:
            continue
        assert len(found.draws) == 2  # what zstd lets through is still a lineage
    for length in range(len(good)):
        with pytest.raises(InvalidRecord, match="lineage"):
            Lineage.decode(good[:length])


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    packed = zstandard.ZstdCompressor(level=1)
    with pytest.raises(InvalidRecord, match="would have"):
        Lineage.decode(packed.compress(bytes(MAX_LINEAGE_BYTES + 1)))


def test_steps_that_disagree_with_the_rows_are_refused() -> None:
    stored = zstandard.decompress(Lineage(draws=(draw(1, 5), draw(2, 6)), learned=()).encode())
    wrong = stored.replace(b'[2,"' + b"0" * 31 + b'2"]', b'[3,"' + b"0" * 31 + b'2"]')
    assert wrong != stored
    with pytest.raises(InvalidRecord, match="belongs to step 2"):
        Lineage.decode(zstandard.compress(wrong))


def labelled(step: int, *episodes: int, indicator: bool = True) -> StepDraw:
    weights = np.linspace(0, 2, 3 * len(episodes), dtype=np.float32).reshape(-1, 3)
    signs = np.asarray([1, 0, -1] * len(episodes), np.int8)[: len(episodes)]
    return replace(
        draw(step, *episodes),
        label_version=1_000_002,
        loss_weight=weights,
        advantage_indicator=signs if indicator else None,
    )


def test_labels_that_are_an_opinion_come_back_to_the_bit_and_facts_stay_without() -> None:
    draws = (draw(1, 5, 6), labelled(2, 5, 7, 9), labelled(3, 9, indicator=False), draw(4, 5))
    found = Lineage.decode(Lineage(draws=draws, learned=(learned(5),)).encode()).draws
    assert all(same(one, two) for one, two in zip(found, draws, strict=True))
    assert [item.label_version for item in found] == [0, 1_000_002, 1_000_002, 0]
    for one, two in zip(found, draws, strict=True):
        for name in ("loss_weight", "advantage_indicator"):
            mine, theirs = getattr(one, name), getattr(two, name)
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                np.testing.assert_array_equal(mine, theirs, strict=True)


def test_without_opinions_the_stored_form_has_no_columns_for_them() -> None:
    stored = zstandard.decompress(Lineage(draws=(draw(1, 5),), learned=()).encode())
    assert b"loss_weight" not in stored
    old = stored.replace(b',"label_versions":{}', b" " * 20)
    assert old != stored
    assert Lineage.decode(zstandard.compress(old)).draws[0].loss_weight is None


def test_damaged_labels_are_refused_or_are_still_labels() -> None:
    good = Lineage(draws=(draw(1, 5), labelled(2, 5, 6)), learned=()).encode()
    raw = zstandard.decompress(good)
    for position in range(len(raw)):
        bad = bytearray(raw)
        bad[position] ^= 0x81
        try:
            found = Lineage.decode(zstandard.compress(bytes(bad))).draws
        except InvalidRecord:
            continue
        for item in found:
            weights, indicator = item.loss_weight, item.advantage_indicator
            assert weights is None or (len(weights) == len(item.keys) and (weights >= 0).all())
            assert indicator is None or (np.abs(indicator) <= 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_weight": np.asarray([[np.inf, 1], [1, 1]], np.float32)}, "labels that are none"),
        ({"loss_weight": np.asarray([[-1, 1], [1, 1]], np.float32)}, "labels that are none"),
        ({"advantage_indicator": np.asarray([2, 1], np.int8)}, "labels that are none"),
        ({"advantage_indicator": np.asarray([-128, 1], np.int8)}, "differ in form"),
        ({"loss_weight": np.ones((2, 1 << 15), np.float32)}, "differ in form"),
    ],
)
def test_labels_that_nobody_gives_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    wrong = Lineage(draws=(replace(labelled(1, 5, 6), **changes),), learned=()).encode()  # type: ignore[arg-type]
    with pytest.raises(InvalidRecord, match=message):
        Lineage.decode(wrong)
