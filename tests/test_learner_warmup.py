"""The warm-up: ends by its criterion, at its maximum, or takes no step; the fleet's learner goes on from it."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SETTINGS
from learner_examples import Moody, WarmUp, open_learner
from sop import system
from sop.broadcast import fetch_policy, published_versions
from sop.buffer import Ingest
from sop.core.errors import RunError
from sop.core.experience import Collection, StepLabels, StoredEpisode
from sop.learner import warmup
from sop.learner.warmup import HeldOut, hold_out
from sop.policies import conditioned
from sop.policies.base import BranchVelocities
from sop.presets import make_config
from sop.runs import Run, create_run, take_base
from sop.system import make_learner_policy, run_learner, run_warmup


class Signed(Moody):
    """Calls every second step good; its opinion never changes."""

    collection = Collection.ON_POLICY
    policy_settings = {"indicator": "embed"}  # noqa: RUF012 - as a property

    def __init__(self, warm_up: WarmUp | None) -> None:
        super().__init__(every=10**6)
        self._warm_up = warm_up

    @property
    def warm_up(self) -> WarmUp | None:
        return self._warm_up

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        signs = np.where(np.arange(episode.num_steps) % 2, 1, -1).astype(np.int8)
        return replace(super().annotate(episode), advantage_indicator=signs)


MakeRun = Callable[[WarmUp | None], tuple[Run, Signed]]


@pytest.fixture
def make_run(finished_base: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """A run with demonstrations and a base policy, whose algorithm is a `Signed`."""

    def make(settings: WarmUp | None) -> tuple[Run, Signed]:
        run = create_run(tmp_path / "run", make_config("debug", [*SETTINGS, "learner.batch_size=8"]))
        take_base(run, finished_base)
        algorithm = Signed(settings)
        monkeypatch.setattr(system, "make_algorithm", lambda *_: algorithm)
        return run, algorithm

    return make


def stopped() -> threading.Event:
    stop = threading.Event()
    stop.set()
    return stop


def test_it_ends_when_the_branches_are_apart_and_the_fleet_s_learner_goes_on_from_it(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "CHECK_EVERY", 2)
    run, algorithm = make_run(WarmUp(warmup_max_steps=50))
    run_warmup(run, threading.Event())
    manifest, weights = fetch_policy(run.store, 1)
    assert (manifest.learner_step, manifest.parent_version, list(published_versions(run.store))) == (2, 0, [0, 1])
    assert any(".indicator" in name for name in weights)
    assert len(algorithm.told) == 12, "what was held out is indexed too"
    run_warmup(run, threading.Event())
    assert list(published_versions(run.store)) == [0, 1], "done once"
    run_learner(run, stopped())
    assert len(algorithm.told) == 12, "nothing is told again"
    manifest, again = fetch_policy(run.store, 2)
    assert (manifest.learner_step, manifest.parent_version, manifest.online_episodes) == (2, 1, 0)
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value)


def test_it_ends_at_its_maximum_with_a_warning_and_the_numbers_are_in_the_metrics(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = make_run(WarmUp(warmup_max_steps=3, warmup_separation=1e9))
    run_warmup(run, threading.Event())
    assert fetch_policy(run.store, 1)[0].learner_step == 3
    assert "ends after 3 steps without its goal" in caplog.text
    lines = (run.folder / "metrics" / "learner.jsonl").read_text()
    assert all(name in lines for name in ("warmup/separation", "warmup/null_loss", "warmup/base_loss"))


@pytest.mark.parametrize("settings", [None, WarmUp(install="cold", warmup_max_steps=9)])
def test_a_rule_that_wants_no_steps_is_prepared_and_published_as_it_is(
    make_run: MakeRun, settings: WarmUp | None
) -> None:
    run, algorithm = make_run(settings)
    run_warmup(run, threading.Event())
    manifest, weights = fetch_policy(run.store, 1)
    assert (manifest.learner_step, len(algorithm.told)) == (0, 12)
    base = fetch_policy(run.store, 0)[1]
    for name, value in base.items():
        np.testing.assert_array_equal(weights[name], value)
    run_learner(run, stopped())
    assert fetch_policy(run.store, 2)[0].parent_version == 1


def test_one_that_is_stopped_leaves_nothing_and_one_that_could_not_publish_does_so_later(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, algorithm = make_run(WarmUp(warmup_max_steps=1))
    with pytest.raises(RunError, match="stopped at step 0"):
        run_warmup(run, stopped())
    assert list(published_versions(run.store)) == [0]
    assert list(run.store.keys("checkpoints/")) == []

    def killed(_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(system.Learner, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            run_warmup(run, threading.Event())
    algorithm.told.clear()
    run_warmup(run, threading.Event())
    assert (fetch_policy(run.store, 1)[0].learner_step, algorithm.told) == (1, [])


def test_before_the_first_step_the_branches_are_one_and_measuring_changes_nothing(finished_base: Run) -> None:
    run, algorithm = finished_base, Signed(None)
    policy = conditioned(make_learner_policy(run)[0], algorithm.policy_settings, seed=1)
    with open_learner(run, algorithm, policy=policy) as (learner, parts):
        episodes = parts.ingest.take(sorted(run.store.keys("demonstrations/")))
        kept, held_out = hold_out(episodes)
        parts.books.index(kept)
        check = warmup.load_held_out(parts, held_out, batch_size=8)
        before = {name: value.clone() for name, value in parts.policy.module.state_dict().items()}
        first = check.measure(parts)
        assert first.separation == 0
        assert check.measure(parts) == first
        for name, value in parts.policy.module.state_dict().items():
            assert torch.equal(value, before[name])
        for _ in range(3):
            learner.take_step()
        raw = {name: value.clone() for name, value in parts.policy.module.state_dict().items()}
        later = check.measure(parts)
        assert later.separation > 0
        assert later.null_loss != first.null_loss
        assert all(torch.equal(value, raw[name]) for name, value in parts.policy.module.state_dict().items())


def test_the_separation_is_the_ratio_of_the_specification(finished_base: Run) -> None:
    with open_learner(finished_base, Moody()) as (_, parts):
        policy, size = parts.policy, (4, 2, 1)

        class TwoBranches:
            module, spec = policy.module, policy.spec

            def branch_velocities(self, batch: Any, generator: torch.Generator) -> BranchVelocities:
                null, negative, positive = (np.full(size, value, np.float32) for value in (2, 9, 3))
                return BranchVelocities(null, negative, positive)

            def loss(self, batch: Any, generator: torch.Generator) -> torch.Tensor:
                assert batch.advantage_indicator is None
                return torch.tensor([1.0, 2.0])

        parts.books.index(parts.ingest.take(sorted(finished_base.store.keys("demonstrations/"))))
        check = HeldOut([parts.loader.next(), parts.loader.next()])
        found = check.measure(replace(parts, policy=TwoBranches()))
        assert (found.separation, found.null_loss) == (0.25, 1.5)


def test_per_task_and_kind_the_last_eighth_is_held_out_and_order_is_kept(finished_base: Run) -> None:
    with finished_base.bus() as bus:
        ingest = Ingest(finished_base.store, bus, finished_base.manifest)
        episodes = ingest.take(sorted(finished_base.store.keys("demonstrations/")))
    kept, held_out = hold_out(episodes)
    assert len({episode.encoded.task for episode in held_out}) == len(held_out) == 3
    places = {id(episode): place for place, episode in enumerate(episodes)}
    for part in (kept, held_out):
        assert [places[id(episode)] for episode in part] == sorted(places[id(episode)] for episode in part)
    assert len(kept) + len(held_out) == len(episodes) == 12
    for episode in held_out:
        same = [other for other in episodes if other.encoded.task == episode.encoded.task]
        assert same[-1] is episode
    many = [episodes[0]] * 24
    assert (len(hold_out(many)[1]), hold_out(many[:1])[1]) == (3, [])
