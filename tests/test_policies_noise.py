"""The noise of an episode: standard normal whatever its chunks have in common, and repeatable."""

import numpy as np
import pytest

from sop.policies.noise import EpisodeNoise


def draws(noise: EpisodeNoise, count: int, size: tuple[int, ...] = (400, 5)) -> np.ndarray:
    return np.stack([noise.standard_normal(size, np.float32) for _ in range(count)])


def test_without_coherence_it_is_numpys_generator_to_the_bit() -> None:
    found = draws(EpisodeNoise(7), 3)
    generator = np.random.default_rng(7)
    np.testing.assert_array_equal(found, [generator.standard_normal((400, 5), np.float32) for _ in range(3)])


@pytest.mark.parametrize("coherence", [0.0, 0.3, 0.7, 1.0])
def test_any_two_draws_of_an_episode_correlate_as_asked_and_each_is_standard_normal(coherence: float) -> None:
    found = draws(EpisodeNoise(3, coherence), 4, (20_000,))
    np.testing.assert_allclose(np.corrcoef(found), coherence + (1 - coherence) * np.eye(4), atol=0.03)
    np.testing.assert_allclose(found.std(axis=1), 1.0, atol=0.02)
    np.testing.assert_allclose(found.mean(axis=1), 0.0, atol=0.03)


def test_an_episode_keeps_its_noise_and_another_has_another() -> None:
    kept = draws(EpisodeNoise(1, 1.0), 3)
    np.testing.assert_array_equal(kept[0], kept[2])
    assert not np.array_equal(kept[0], draws(EpisodeNoise(2, 1.0), 1)[0])
    np.testing.assert_array_equal(kept, draws(EpisodeNoise(1, 1.0), 3))


@pytest.mark.parametrize("coherence", [-0.1, 1.1, float("nan")])
def test_a_coherence_that_is_none_is_refused(coherence: float) -> None:
    with pytest.raises(ValueError, match=r"coherence must be in \[0, 1\]"):
        EpisodeNoise(0, coherence)
