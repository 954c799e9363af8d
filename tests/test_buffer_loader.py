"""From windows to batches: the same bits wherever they are made, in the order of the draws, labelled once."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from buffer_examples import colourful, index_of, make_windows, put_episode
from sop.algorithms import make_algorithm
from sop.buffer import BatchLoader, Payloads, open_payloads
from sop.buffer.cache import LocalPayloads
from sop.buffer.loader import BatchLabels, LabelCache
from sop.buffer.windows import valid_lengths
from sop.core.codec import EncodedEpisode, decode, encode
from sop.core.errors import InvalidRecord, NotFound, StoreUnavailable
from sop.core.experience import Batch, StepLabels, Windows, batch_hash
from sop.testing.episodes import make_episode
from sop.testing.memory import MemoryStore
from sop.transport import DirectoryStore, ObjectStore

HORIZON = 4
STEPS = ("pphhhhhp", "hhhhhh", "pppphhhhhh", "hhhhhhhhhhhh")
ANNOTATE = make_algorithm("hg_dagger", {"handover_s": 0.0}, control_hz=10.0).annotate
GB = 10**9


def put_all(store: ObjectStore) -> list[str]:
    versions = (3, None, 7, None)
    return [
        put_episode(store, colourful(steps, number, policy_version=version))
        for number, (steps, version) in enumerate(zip(STEPS, versions, strict=True))
    ]


@contextmanager
def open_loader(
    store: ObjectStore,
    keys: list[str],
    folder: Path,
    *,
    workers: int = 0,
    disk_bytes: int = GB,
    annotate: Callable[[EncodedEpisode], StepLabels] = ANNOTATE,
    draws: Iterator[Windows] | None = None,
    depth: int = 2,
    label_bytes: int = GB,
) -> Iterator[BatchLoader]:
    payloads = open_payloads(store, folder, memory_bytes=GB, disk_bytes=disk_bytes)
    draw = (lambda: next(draws)) if draws is not None else lambda: pytest.fail("nothing is drawn")
    with (
        closing(payloads),
        closing(
            BatchLoader(
                index_of(keys),
                payloads,
                annotate,
                draw,
                horizon=HORIZON,
                depth=depth,
                decode_workers=workers,
                label_bytes=label_bytes,
            )
        ) as loader,
    ):
        yield loader


def expected_batch(store: ObjectStore, keys: list[str], windows: Windows) -> Batch:
    """The batch, computed window by window from fully decoded episodes."""
    episodes = [decode(store.get(key)) for key in keys]
    actions, weights = [], []
    for row, start in zip(windows.episode, windows.start, strict=True):
        labels = ANNOTATE(EncodedEpisode(store.get(keys[row])))
        length = int(valid_lengths(labels, HORIZON)[start])
        steps = [min(start + step, start + max(length, 1) - 1) for step in range(HORIZON)]
        actions.append(episodes[row].action[steps])
        weights.append([labels.loss_weight[start + step] if step < length else 0.0 for step in range(HORIZON)])
    places = list(zip(windows.episode, windows.start, strict=True))
    batch = Batch(
        windows=windows,
        images={
            name: np.stack([episodes[row].images[name][start] for row, start in places]) for name in ("wrist", "front")
        },
        state=np.stack([episodes[row].state[start] for row, start in places]),
        action=np.stack(actions),
        loss_weight=np.asarray(weights, np.float32),
        instruction=tuple(episodes[row].instruction for row, _ in places),
        policy_version=np.asarray([{0: 3, 2: 7}.get(int(row), -1) for row, _ in places], np.int64),
    )
    return replace(batch, content_hash=batch_hash(batch))


def assert_equal(batch: Batch, wanted: Batch) -> None:
    for field in fields(Batch):
        mine, theirs = getattr(batch, field.name), getattr(wanted, field.name)
        if field.name == "images":
            assert list(mine) == list(theirs)
            for camera in theirs:
                np.testing.assert_array_equal(mine[camera], theirs[camera], strict=True)
        elif isinstance(theirs, np.ndarray):
            np.testing.assert_array_equal(mine, theirs, strict=True)
        elif field.name != "windows":
            assert mine == theirs, field.name


WINDOWS = [
    make_windows([(0, 2), (0, 6), (3, 11), (2, 8), (1, 0), (1, 0)]),
    make_windows([(3, 4)]),
    make_windows([(2, 1), (0, 0), (2, 9)]),
]


PLACES = {"memory": 0, "directory": GB, "disk cache": GB, "tight": 1}
"""Kind of store and cache -> bytes of the disk cache."""


@pytest.mark.parametrize(
    ("kind", "workers"),
    [(kind, workers) for kind in PLACES for workers in (0, 1, 2) if kind != "memory" or not workers],  # they read files
)
def test_batches_are_the_same_bits_wherever_they_are_made(kind: str, workers: int, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store") if kind == "directory" else MemoryStore()
    keys = put_all(store)
    with open_loader(
        store, keys, tmp_path / "cache", workers=workers, disk_bytes=PLACES[kind], draws=iter(WINDOWS * 3), depth=4
    ) as loader:
        got = [loader.next() for _ in range(5)] + [loader.load(windows) for windows in WINDOWS]
    for batch, windows in zip(got, WINDOWS + WINDOWS[:2] + WINDOWS, strict=True):
        assert batch.windows is windows
        assert_equal(batch, expected_batch(store, keys, windows))


class Blinking(LocalPayloads):
    """The store goes away after it was found there and before a worker looks, and comes back while somebody waits."""

    def __init__(self, store: DirectoryStore, away: Path) -> None:
        super().__init__(store, pause=lambda _: away.rename(store.root))
        self.asked = 0
        self._root, self._away = store.root, away

    @contextmanager
    def holding(self, keys: Sequence[str]) -> Iterator[Sequence[Path]]:
        """Away during the first time."""
        self.asked += 1
        with super().holding(keys) as paths:
            if self.asked == 1:
                self._root.rename(self._away)
            yield paths


def test_a_store_that_is_away_for_a_moment_delays_a_batch_and_a_missing_episode_does_not_wait(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    keys = put_all(store)
    payloads = Blinking(store, tmp_path / "away")
    with closing(
        BatchLoader(index_of(keys), payloads, ANNOTATE, lambda: WINDOWS[0], horizon=HORIZON, depth=1, decode_workers=1)
    ) as loader:
        assert_equal(loader.load(WINDOWS[2]), expected_batch(store, keys, WINDOWS[2]))
        assert payloads.asked == 2
        store.delete(keys[3])
        with pytest.raises(NotFound, match=keys[3]):
            loader.load(WINDOWS[1])


def test_worker_processes_and_no_files_are_refused_at_the_start() -> None:
    payloads = open_payloads(MemoryStore(), Path("unused"), memory_bytes=GB, disk_bytes=0)
    with pytest.raises(ValueError, match="decode_workers=0"):
        BatchLoader(index_of([]), payloads, ANNOTATE, lambda: WINDOWS[0], horizon=4, depth=1, decode_workers=1)


def test_draws_are_made_ahead_kept_in_order_and_restored(tmp_path: Path) -> None:
    store = MemoryStore()
    keys = put_all(store)
    drawn: list[int] = []

    def draws() -> Iterator[Windows]:
        for number in range(100):
            drawn.append(number)
            yield make_windows([(number % 4, number % 6)])

    with open_loader(store, keys, tmp_path, draws=draws()) as loader:
        assert (int(loader.next().windows.start[0]), drawn) == (0, [0, 1, 2])
        assert (int(loader.next().windows.start[0]), drawn) == (1, [0, 1, 2, 3])
        pending = loader.pending()
        assert [int(windows.start[0]) for windows in pending] == [2, 3]
        wanted = [loader.next().content_hash for _ in range(2)]
    with open_loader(store, keys, tmp_path, draws=draws()) as resumed:
        resumed.restore(pending)
        assert [resumed.next().content_hash for _ in range(2)] == wanted


def test_a_batch_that_cannot_be_loaded_says_so_when_it_is_due(tmp_path: Path) -> None:
    store = MemoryStore()
    keys = put_all(store)

    def away(operation: str, key: str) -> None:
        if key == keys[1]:
            raise StoreUnavailable("away")

    store.tamper(keys[0], encode(make_episode("pp")))
    for workers in (0, 1):
        with open_loader(
            store, keys, tmp_path, workers=workers, draws=iter([WINDOWS[1], WINDOWS[0], WINDOWS[1]])
        ) as loader:
            assert loader.next().windows is WINDOWS[1]
            with pytest.raises(InvalidRecord, match=keys[0]):
                loader._pending.popleft().future.result()
            store.before = away
            assert loader.load(WINDOWS[1]).windows is WINDOWS[1]
            store.before = lambda operation, key: None


def test_an_episode_is_annotated_once_until_the_algorithm_changes_its_mind(tmp_path: Path) -> None:
    store = MemoryStore()
    keys = put_all(store)
    asked: list[int] = []
    weight = 1.0

    def annotate(episode: EncodedEpisode) -> StepLabels:
        asked.append(episode.header.sequence)
        steps = episode.num_steps
        return StepLabels(
            loss_weight=np.full(steps, weight, np.float32),
            segment=np.zeros(steps, np.int32),
            can_start=np.ones(steps, np.bool_),
            advantage_indicator=np.full(steps, -1, np.int8) if episode.header.sequence else None,
        )

    with open_loader(store, keys, tmp_path, annotate=annotate) as loader:
        batches = [loader.load(windows) for windows in (WINDOWS[0], WINDOWS[2], WINDOWS[1])]
        assert asked == [0, 1, 2, 3]
        assert [batch.advantage_indicator is None for batch in batches] == [True, True, False]
        assert batches[2].advantage_indicator is not None
        assert batches[2].advantage_indicator.tolist() == [-1]
        weight = 0.5
        loader.relabel()
        assert loader.load(WINDOWS[1]).loss_weight.tolist() == [[0.5] * 4]
    assert asked == [0, 1, 2, 3, 3]


def test_an_episode_whose_labels_are_beyond_the_bound_is_annotated_again(tmp_path: Path) -> None:
    store = MemoryStore()
    keys = put_all(store)
    asked: list[int] = []

    def annotate(episode: EncodedEpisode) -> StepLabels:
        asked.append(episode.header.sequence)
        return ANNOTATE(episode)

    for label_bytes, wanted in ((GB, [3, 0, 1]), (1, [3, 0, 1, 3])):
        asked.clear()
        with open_loader(store, keys, tmp_path, annotate=annotate, label_bytes=label_bytes) as loader:
            for windows in (WINDOWS[1], make_windows([(0, 2), (1, 0)]), WINDOWS[1]):
                assert_equal(loader.load(windows), expected_batch(store, keys, windows))
        assert asked == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_a_change_of_mind_labels_what_is_on_its_way_again_and_changes_nothing_else(
    workers: int, tmp_path: Path
) -> None:
    store = MemoryStore()
    keys = put_all(store)
    asked: list[tuple[int, int]] = []
    threads: set[str] = set()
    mind = 1

    def annotate(episode: EncodedEpisode) -> StepLabels:
        asked.append((mind, episode.sequence))
        threads.add(threading.current_thread().name)
        labels = ANNOTATE(episode)
        return replace(labels, loss_weight=labels.loss_weight * mind, label_version=10 * mind + episode.sequence)

    with open_loader(
        store, keys, tmp_path, annotate=annotate, workers=workers, draws=iter(WINDOWS * 3), depth=3
    ) as loader:
        first = loader.next()
        pending = loader.pending()
        mind = 2
        loader.relabel()
        assert [id(windows) for windows in loader.pending()] == [id(windows) for windows in pending]
        got = [loader.next() for _ in range(3)]
    for batch, windows in zip((first, *got), WINDOWS + WINDOWS[:1], strict=True):
        wanted = expected_batch(store, keys, windows)
        factor, newest = (1 if batch is first else 2), int(windows.episode.max())
        weighted = replace(wanted, loss_weight=wanted.loss_weight * factor, label_version=10 * factor + newest)
        assert_equal(batch, replace(weighted, content_hash=batch_hash(weighted)))
    assert threads == {threading.current_thread().name}, "only the learner's thread asks"
    assert asked == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 3), (2, 0), (2, 2), (2, 1)]


def test_given_labels_are_taken_as_they_are_and_nobody_is_asked(tmp_path: Path) -> None:
    store = MemoryStore()
    keys = put_all(store)

    def annotate(_: EncodedEpisode) -> StepLabels:
        raise AssertionError("asked")

    with open_loader(store, keys, tmp_path) as loader:
        wanted = loader.load(WINDOWS[0])
    labels = BatchLabels(loss_weight=wanted.loss_weight, advantage_indicator=None)
    with open_loader(store, keys, tmp_path, annotate=annotate) as loader:
        assert_equal(loader.load(WINDOWS[0], labels), wanted)


def test_labels_are_kept_within_their_bound() -> None:
    class Source:
        """Every key is an episode of its own."""

        on_disk = False
        asked: list[str]

        def get(self, key: str) -> EncodedEpisode:
            self.asked.append(key)
            return encoded

    encoded, source = EncodedEpisode(encode(make_episode("hhhh", policy_version=None))), Source()
    source.asked = []
    labels = LabelCache(_payloads(source), ANNOTATE, HORIZON, max_bytes=2 * (600 + 4 * 6))
    for key in ("a", "b", "a", "c", "a", "b"):
        kept = labels.get(key)
        assert (kept.length.tolist(), kept.length.dtype, kept.loss_weight.tolist()) == ([4, 3, 2, 1], np.int16, [1] * 4)
    assert (source.asked, labels.num_bytes) == (["a", "b", "c", "b"], 2 * (600 + 4 * 6))
    with pytest.raises(ValueError, match="horizon must be"):
        LabelCache(_payloads(source), ANNOTATE, 1 << 15, max_bytes=1)


def _payloads(source: object) -> Payloads:
    return source  # type: ignore[return-value]


def test_the_hash_of_a_batch_sees_every_field_and_not_the_memory_layout(tmp_path: Path) -> None:
    store = MemoryStore()
    keys = put_all(store)
    with open_loader(store, keys, tmp_path) as loader:
        batch = loader.load(WINDOWS[0])
    assert batch.content_hash == batch_hash(batch) == batch_hash(replace(batch, content_hash=""))
    front = batch.images["front"]
    shuffled = dict(reversed(batch.images.items())) | {"front": np.asfortranarray(front)}
    assert batch_hash(replace(batch, images=shuffled)) == batch.content_hash
    darker = front.copy()
    darker[3, 0, 7, 1] ^= 1
    changes: list[dict[str, object]] = [
        {"images": {**batch.images, "front": darker}},
        {"images": {"front": front}},
        {"images": {"wrist": front, "front": batch.images["wrist"]}},
        {"state": batch.state + 1},
        {"action": batch.action.astype(np.float64)},
        {"loss_weight": batch.loss_weight[:, ::-1]},
        {"policy_version": batch.policy_version + 1},
        {"advantage_indicator": np.zeros(6, np.int8)},
        {"instruction": (*batch.instruction[:-1], "push")},
        {"windows": replace(batch.windows, start=batch.windows.start + 1)},
    ]
    found = {batch_hash(replace(batch, **change)) for change in changes}  # type: ignore[arg-type]
    assert len(found | {batch.content_hash}) == len(changes) + 1
