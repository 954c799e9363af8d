"""What a policy version learned from: the stored form, merging, and refusal of what is damaged."""

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
