"""Instructions as vectors, and the cache in front of the transformer."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sop.policies.sentences import HashEncoder, SentenceEncoder, default_cache_folder


class CountingModel:
    """Embeds a sentence as its letters' counts; counts how often it is loaded and asked."""

    def __init__(self) -> None:
        self.loads = 0
        self.asked: list[str] = []

    def load(self) -> Callable[[list[str]], npt.NDArray[np.float32]]:
        self.loads += 1
        return self.embed

    def embed(self, sentences: list[str]) -> npt.NDArray[np.float32]:
        self.asked += sentences
        vectors = np.zeros((len(sentences), 384), np.float32)
        for row, sentence in enumerate(sentences):
            for letter in sentence:
                vectors[row, ord(letter) % 384] += 1
        return vectors


def test_a_cached_sentence_does_not_load_the_model(tmp_path: Path) -> None:
    model = CountingModel()
    first = SentenceEncoder(tmp_path, model.load)
    vectors = first.encode(["open", "close", "open"])
    assert first.model_loaded
    assert model.asked == ["open", "close"]
    second = SentenceEncoder(tmp_path, model.load)
    assert np.array_equal(second.encode(["close", "open"]), vectors[[1, 0]])
    assert not second.model_loaded
    assert model.loads == 1


def test_a_new_sentence_beside_cached_ones_is_computed_alone(tmp_path: Path) -> None:
    model = CountingModel()
    SentenceEncoder(tmp_path, model.load).encode(["open"])
    encoder = SentenceEncoder(tmp_path, model.load)
    encoder.encode(["open", "push"])
    encoder.encode(["push"])
    assert model.asked == ["open", "push"]


def test_rows_follow_the_order_of_the_sentences_and_have_length_one(tmp_path: Path) -> None:
    encoder = SentenceEncoder(tmp_path, CountingModel().load)
    vectors = encoder.encode(["ab", "b", "ab"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert np.array_equal(vectors[0], vectors[2])
    assert vectors[1, ord("b")] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: np.save(path, np.full(384, np.nan, np.float32)),
        lambda path: np.save(path, np.ones(3, np.float32)),
        lambda path: np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True),
    ],
    ids=["empty", "truncated", "not finite", "another size", "pickled"],
)
def test_a_corrupt_entry_is_computed_again_and_replaced(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    model = CountingModel()
    encoder = SentenceEncoder(tmp_path, model.load)
    expected = encoder.encode(["open"])
    damage(encoder.cache_file("open"))
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(SentenceEncoder(tmp_path, model.load).encode(["open"]), expected)
    assert str(encoder.cache_file("open")) in caplog.text
    repaired = SentenceEncoder(tmp_path, model.load)
    assert np.array_equal(repaired.encode(["open"]), expected)
    assert not repaired.model_loaded
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return (Path.touch, (self.path,))


def test_a_cache_file_cannot_run_code(tmp_path: Path) -> None:
    encoder = SentenceEncoder(tmp_path / "cache", CountingModel().load)
    (tmp_path / "cache").mkdir()
    np.save(encoder.cache_file("open"), np.array([Bomb(tmp_path / "exploded")], dtype=object), allow_pickle=True)
    encoder.encode(["open"])
    assert not (tmp_path / "exploded").exists()


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert SentenceEncoder(blocked / "cache", CountingModel().load).encode(["open"]).shape == (1, 384)
    assert "cannot be written" in caplog.text


def test_the_cache_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOP_CACHE", str(tmp_path))
    assert default_cache_folder() == tmp_path / "sentences"
    monkeypatch.delenv("SOP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_folder() == tmp_path / "home" / ".cache" / "sop" / "sentences"


def test_hashed_sentences_are_repeatable_unit_vectors_that_differ() -> None:
    vectors = HashEncoder().encode(["open", "close", "open"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert np.array_equal(vectors[0], vectors[2])
    assert abs(vectors[0] @ vectors[1]) < 0.5
    assert np.array_equal(HashEncoder().encode(["close"])[0], vectors[1])


@pytest.mark.slow
def test_the_transformer_puts_similar_sentences_closer_than_different_ones(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra learner")
    encoder = SentenceEncoder(tmp_path)
    pull, draw, press = encoder.encode(
        ["open the drawer", "pull the drawer out by its handle", "press the button from above"]
    )
    assert encoder.model_loaded
    assert pull @ draw > pull @ press + 0.2
    assert pull @ draw > draw @ press + 0.2
