"""Sequence numbers: where an actor is complete, what is missing, and that neither can cost much memory."""

import numpy as np
import pytest

from sop.buffer import sequences
from sop.buffer.sequences import Run, SequenceProgress


def test_sequence_progress_knows_the_gaps() -> None:
    progress = SequenceProgress()
    for number in (0, 1, 4, 2, 6):
        progress.add(number, f"key-{number}")
        progress.add(number, f"key-{number}")
    assert (progress.next_sequence, progress.last_key) == (3, "key-2")
    assert progress.missing() == [range(3, 4), range(5, 6)]


def test_a_hostile_gap_costs_nothing_and_many_gaps_cost_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 50
    monkeypatch.setattr(sequences, "MAX_RUNS", bound)
    progress = SequenceProgress()
    progress.add(99_999_999, "far")
    assert progress.missing() == [range(99_999_999)]
    for number in range(1, 5 * bound, 2):
        progress.add(number, f"key-{number}")
    assert len(progress.missing()) == bound
    for number in range(0, 5 * bound, 2):
        progress.add(number, f"key-{number}")
    assert progress.next_sequence >= 2 * bound, "the first gaps are remembered, and close"
    for number in range(5 * bound):
        progress.add(number, f"key-{number}")
    assert (progress.next_sequence, progress.missing()) == (5 * bound, []), "what was forgotten is noted again"


@pytest.mark.parametrize("seed", range(20))
def test_progress_is_that_of_a_set_of_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    progress, known = SequenceProgress(), set()
    for _ in range(60):
        first = int(rng.integers(0, 40))
        stop = first + int(rng.integers(1, 4))
        progress.extend([Run(first, stop, f"key-{stop - 1}")])
        known |= set(range(first, stop))
        complete = next(number for number in range(50) if number not in known)
        assert progress.next_sequence == complete
        assert progress.last_key == (f"key-{complete - 1}" if complete else None)
        missing = [number for numbers in progress.missing() for number in numbers]
        assert missing == [number for number in range(max(known)) if number not in known]
