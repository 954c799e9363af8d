"""From a version to its episodes, from an episode to its versions, and the batch of a step drawn again."""

import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from sop.broadcast import fetch_manifest, published_versions
from sop.buffer.screening import Flag, Rule, encode_note
from sop.cli import main
from sop.core import layout
from sop.core.codec import EncodedEpisode
from sop.core.errors import InvalidRecord, NotFound, RunError
from sop.core.lineage import Lineage
from sop.learner import Learner
from sop.lineage import ancestry, find_draw, learned_by, read_lineage
from sop.replay import replay_batch
from sop.runs import Run, open_run
from sop.system import make_learner_policy
from sop.tracing import find_episode, trace_version
from sop.wiring import learner_parts

pytestmark = pytest.mark.slow
STEPS = 9


@pytest.fixture(scope="module")
def trained(finished_base: Run) -> Run:
    """A learner that published after steps 4, 8 and at the end, with six episodes of the fleet."""
    run = finished_base
    policy, algorithm = make_learner_policy(run)
    config = replace(run.config.learner, publish_every=4, cooldown_steps=STEPS - 1, checkpoint_every=100)
    with learner_parts(run, policy, algorithm, config) as parts:
        learner = Learner(parts, config, target_episodes=6)
        parts.books.index(parts.ingest.take(sorted(run.store.keys("demonstrations/"))))
        parts.ingest.reconcile()
        learner.run(threading.Event())
    return run


def newest(run: Run) -> int:
    return list(published_versions(run.store))[-1]


def test_every_step_belongs_to_exactly_one_version(trained: Run) -> None:
    generations = list(learned_by(trained.store, newest(trained)))
    assert [manifest.parent_version for manifest, _ in generations[:-1]] == [
        manifest.version for manifest, _ in generations[1:]
    ]
    assert generations[-1][0].version == 0
    steps = [draw.learner_step for _, lineage in reversed(generations[:-1]) for draw in lineage.draws]
    assert steps == list(range(1, STEPS + 1))
    for (manifest, lineage), (parent, _) in pairwise(generations[:-1]):
        own = [draw.learner_step for draw in lineage.draws]
        assert own == list(range(parent.learner_step + 1, manifest.learner_step + 1))


def test_an_episode_is_new_to_one_version_only(trained: Run) -> None:
    lineages = [lineage for _, lineage in learned_by(trained.store, newest(trained))]
    learned = [episode.key for lineage in lineages for episode in lineage.learned]
    drawn = {key for lineage in lineages for draw in lineage.draws for key in draw.keys}
    fleet = [key for key in learned if not layout.from_lab(key)]
    assert len(fleet) == len(set(fleet)) > 0
    assert set(learned) == drawn


def test_a_version_names_its_teachers_and_how_much_it_saw_of_each(trained: Run) -> None:
    trace = trace_version(trained.store, newest(trained))
    base = fetch_manifest(trained.store, 0)
    assert trace.steps == base.learner_step + STEPS
    assert trace.windows.keys() == trace.learned.keys()
    batch = trained.config.learner.batch_size
    assert trace.windows.total() == base.learner_step * trained.config.pretrain.batch_size + STEPS * batch
    assert trace.manifest.parent_version == trace.manifest.version - 1
    for key, episode in trace.learned.items():
        marks = EncodedEpisode(trained.store.get(key)).interventions
        assert episode.operators == tuple(sorted({mark.operator for mark in marks}))
        assert episode.human_steps == sum(mark.stop - mark.start for mark in marks)
    assert {name for episode in trace.learned.values() for name in episode.operators or ()} >= {"demonstrator"}


def test_the_batch_of_any_step_is_drawn_again_to_the_bit(trained: Run) -> None:
    for step in (1, 5, STEPS):
        replay = replay_batch(trained, step)
        assert replay.same
        assert replay.manifest.version == find_draw(trained.store, step)[0].version
    assert replay_batch(trained, 1).batch.content_hash != replay_batch(trained, 2).batch.content_hash


def test_a_step_of_pretraining_is_drawn_again_too(trained: Run) -> None:
    replay = replay_batch(trained, 3, version=0)
    assert replay.same
    assert (replay.batch.policy_version == -1).all()


def test_the_steps_of_pretraining_are_found_in_the_base_only(trained: Run) -> None:
    assert find_draw(trained.store, 2)[0].version > 0
    assert find_draw(trained.store, 2, version=0)[0].version == 0


def test_a_step_that_nobody_took_is_an_error_that_says_up_to_where_there_are_some(trained: Run) -> None:
    with pytest.raises(RunError, match=f"step 99999 is in no published version: .* learned up to {STEPS}"):
        find_draw(trained.store, 99999)


def test_a_lineage_that_was_altered_is_refused(trained: Run) -> None:
    manifest = fetch_manifest(trained.store, newest(trained))
    assert manifest.lineage is not None
    key, good = manifest.lineage.key, trained.store.get(manifest.lineage.key)
    trained.store.delete(key)
    try:
        with pytest.raises(InvalidRecord, match="is not there"):
            read_lineage(trained.store, manifest)
        trained.store.put(key, Lineage(draws=(), learned=()).encode())
        with pytest.raises(InvalidRecord, match="is altered"):
            read_lineage(trained.store, manifest)
    finally:
        trained.store.delete(key)
        trained.store.put(key, good)


def test_the_ancestry_ends_with_an_error_where_a_manifest_is_missing(trained: Run) -> None:
    with pytest.raises(NotFound):
        list(ancestry(trained.store, 12345))


def test_an_episode_is_found_by_id_by_number_and_by_key_and_never_by_guess(trained: Run) -> None:
    key = next(iter(trained.store.keys("episodes/")))
    name = layout.EpisodeKey.parse(key)
    assert find_episode(trained.store, name.episode_id[:12]) == key
    assert find_episode(trained.store, f"{name.actor_id}/{name.sequence}") == key
    assert find_episode(trained.store, key) == key
    with pytest.raises(RunError, match="0 episodes are called 'zzz'"):
        find_episode(trained.store, "zzz")
    with pytest.raises(RunError, match="0 episodes are called ''"):
        find_episode(trained.store, "")
    first = Counter(layout.EpisodeKey.parse(key).episode_id[0] for key in trained.store.keys("demonstrations/"))
    first += Counter(layout.EpisodeKey.parse(key).episode_id[0] for key in trained.store.keys("episodes/"))
    letter, count = first.most_common(1)[0]
    assert count > 1, "18 episodes, 16 digits"
    with pytest.raises(RunError, match=f"{count} episodes are called '{letter}': "):
        find_episode(trained.store, letter)


def test_the_commands_print_both_directions(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = trained.place
    assert main(["inspect", place]) == 0
    shown = capsys.readouterr().out
    assert "freshness: seconds" in shown
    assert "robots in what was learned" in shown
    assert main(["inspect", place, "--version", str(newest(trained))]) == 0
    shown = capsys.readouterr().out
    assert "whose corrections" in shown
    assert f"parent version {newest(trained) - 1}" in shown
    trace = trace_version(trained.store, newest(trained))
    fleet = next(key for key in trace.learned if not layout.from_lab(key))
    assert main(["inspect", place, "--episode", layout.EpisodeKey.parse(fleet).episode_id]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "versions drew from it" in shown
    assert "first drawn +" in shown
    out = tmp_path / "batch.safetensors"
    assert main(["replay-batch", place, "--step", "5", "--out", str(out)]) == 0
    assert "the same batch" in capsys.readouterr().out
    arrays = safetensors.numpy.load_file(out)
    np.testing.assert_array_equal(arrays["state"], replay_batch(open_run(place), 5).batch.state)
    assert main(["replay-batch", place, "--step", "99999"]) == 1
    assert main(["inspect", place, "--version", "99999"]) == 1


def test_inspect_says_what_is_not_learned_from_and_why_and_goes_on_behind_a_damaged_note(
    trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted(trained.store.keys("episodes/"))[:2]
    written = {
        layout.screened(first): b"{",
        layout.screened(second): encode_note(second, (Flag(Rule.BLACK_IMAGES, "3 of 9 are black"),)),
    }
    for key, note in written.items():
        trained.store.put(key, note)
    try:
        assert main(["inspect", trained.place]) == 0
    finally:
        for key in written:
            trained.store.delete(key)
    shown = " ".join(capsys.readouterr().out.split())
    assert "unreadable screened/episodes/" in shown
    assert "black_images: 3 of 9 are black" in shown
