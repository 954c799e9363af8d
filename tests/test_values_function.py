"""The value function learns, is whole or unchanged, resumes to the bit, and starts from the policy's eyes."""

import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sop.core.codec import EncodedEpisode, encode
from sop.core.episode import Episode, Outcome
from sop.core.errors import InvalidRecord, RunError
from sop.core.policy import PolicySpec
from sop.policies import make_policy, make_spec
from sop.testing.episodes import TOY_BODY, make_episode
from sop.values import ReturnSettings, ValueFunction, ValueSettings, rank_correlation
from sop.values.network import SHARED, encoder_settings

TINY = {
    "action_horizon": 4, "width": 16, "heads": 2, "channels": [4, 8, 8], "keypoints": 4, "grid": 2,
    "text_encoder": "hash", "precision": "float32",
}  # fmt: skip
STATISTICS = {"state_mean": (0.0, 0.0), "state_std": (1.0, 1.0), "action_mean": (0.0, 0.0), "action_std": (1.0, 1.0)}
SPEC = make_spec("flow_vla", TINY, TOY_BODY, 2, STATISTICS)
FRESH = ValueSettings(init="fresh", num_bins=51, steps=4, batch_size=8, random_shift=1, warmup_steps=2)


def telling_episode(seed: int, steps: int = 12, **changes: Any) -> Episode:
    """Brightness says how far it is, the colour how it ends; the state says nothing."""
    rng = np.random.default_rng(seed)
    outcome = changes.setdefault("outcome", Outcome.SUCCESS if seed % 2 else Outcome.FAILURE)
    level = np.linspace(20, 220, steps)[:, None, None, None]
    colour = np.asarray([1.0, 0.2, 1.0] if outcome is Outcome.SUCCESS else [0.2, 1.0, 1.0])
    images = (level * colour + rng.uniform(0, 20, (steps, 16, 16, 3))).astype(np.uint8)
    state = rng.standard_normal((steps, 2)).astype(np.float32)
    return make_episode(**({"controllers": "p" * steps, "images": {"front": images}, "state": state} | changes))


EPISODES = [telling_episode(seed) for seed in range(4)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small get slower with every further thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_function(**changes: Any) -> ValueFunction:
    return ValueFunction(SPEC, dataclasses.replace(FRESH, **changes))


def same_predictions(left: ValueFunction, right: ValueFunction) -> bool:
    return all(np.array_equal(left.predict(one), right.predict(one)) for one in EPISODES)


def test_a_fit_learns_what_is_to_be_seen_and_ranks_episodes_that_it_has_not_seen() -> None:
    function = small_function(steps=150, batch_size=32, lr=3e-3)
    report = function.fit([telling_episode(seed) for seed in range(12)])
    assert function.version == 1
    assert (len(report.losses), report.num_frames) == (150, 12 * 12)
    assert report.losses[-1] < 0.75 * report.losses[0]
    unseen = [telling_episode(seed, steps) for seed, steps in ((100, 12), (101, 12), (102, 9), (103, 10))]
    values = np.concatenate([function.predict(episode) for episode in unseen])
    realised = np.concatenate([function.returns(episode) for episode in unseen])
    assert values.dtype == np.float32
    assert rank_correlation(values, realised) > 0.9
    assert np.abs(values - realised).mean() < 0.08


def test_an_untrained_function_says_the_middle_everywhere() -> None:
    function = small_function()
    assert function.version == 0
    np.testing.assert_allclose(function.predict(EPISODES[0]), np.full(12, -0.5), atol=1e-6)


def test_stored_bytes_are_read_like_an_episode() -> None:
    stored = [EncodedEpisode(encode(one)) for one in EPISODES]
    function = small_function()
    function.fit(stored)
    values = function.predict(stored[1])
    assert values.shape == (12,)
    assert ((values >= -1) & (values <= 0)).all()


def test_equal_seeds_give_equal_fits_and_the_global_generator_is_not_touched() -> None:
    functions = [small_function(dropout=0.2) for _ in range(3)]
    before = torch.random.get_rng_state()
    reports = [function.fit(EPISODES, seed=seed) for function, seed in zip(functions, (5, 5, 6), strict=True)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert reports[0].losses == reports[1].losses
    assert reports[0].losses != reports[2].losses
    assert same_predictions(functions[0], functions[1])
    assert not same_predictions(functions[0], functions[2])


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint keeps it: arrays apart, the rest as JSON."""
    arrays = {name: value.copy() for name, value in state.items() if isinstance(value, np.ndarray)}
    assert all(name.startswith("value/") for name in arrays)
    rest = {name: value for name, value in state.items() if name not in arrays}
    return json.loads(json.dumps(rest)) | arrays | {"of": "another"}


def test_a_restored_function_predicts_and_fits_on_to_the_bit() -> None:
    policy = make_policy(SPEC, seed=3)
    settings = dataclasses.replace(FRESH, init="policy", seed=2)
    function = ValueFunction(SPEC, settings, ReturnSettings(failure_cost=0.5), module=policy.module)
    function.fit(EPISODES)
    again = ValueFunction.from_state(through_json(function.state_dict()))
    assert (again.version, again.task_steps, again.copied) == (1, {"push": 12}, function.copied)
    assert (again.settings, again.return_settings) == (settings, ReturnSettings(failure_cost=0.5))
    assert same_predictions(function, again)
    assert function.fit(EPISODES).losses == again.fit(EPISODES).losses
    assert same_predictions(function, again)


def test_a_saved_state_is_a_copy() -> None:
    function = small_function()
    state = function.state_dict()
    function.fit(EPISODES)
    assert ValueFunction.from_state(state).version == 0
    assert not same_predictions(function, ValueFunction.from_state(state))


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda state: state.pop("value"), "value"),
        (lambda state: state["value"].pop("spec"), "spec"),
        (lambda state: state.pop("value/head_out.bias"), "head_out.bias"),
        (lambda state: state.update({"value/head_out.bias": np.zeros(3, np.float32)}), "size mismatch"),
        (lambda state: state["value"]["settings"].update(bins=3), "no setting is called 'bins'"),
    ],
)
def test_a_damaged_state_is_refused(break_it: Any, problem: str) -> None:
    state = small_function().state_dict()
    break_it(state)
    with pytest.raises(ValueError, match=problem):
        ValueFunction.from_state(state)


def test_the_encoder_starts_as_the_policys_and_nothing_else_does() -> None:
    policy = make_policy(SPEC, seed=9)
    settings = dataclasses.replace(FRESH, init="policy")
    theirs = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    function = ValueFunction(SPEC, settings, module=policy.module)
    state = function.state_dict()
    shared = [name for name in theirs if name.startswith(SHARED)]
    assert function.copied == len(shared) > 20
    for name in shared:
        np.testing.assert_array_equal(state[f"value/{name}"], theirs[name].numpy())
    alone = ValueFunction(SPEC, FRESH).state_dict()
    rest = [name for name in state if name.startswith("value/") and name.removeprefix("value/") not in shared]
    assert sorted(rest) == [f"value/head_{part}" for part in ("in.bias", "in.weight", "out.bias", "out.weight")]
    assert all(np.array_equal(state[name], alone[name]) for name in rest)
    function.fit(EPISODES)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in policy.module.state_dict().items())


class OtherPolicy(nn.Module):
    """One tensor of the right name and shape, one of another shape, one outside of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"norm": nn.LayerNorm(16), "proprioception": nn.Linear(7, 16)})
        self.head_out = nn.Linear(32, 51)
        nn.init.constant_(self.backbone["norm"].weight, 3.0)


def test_of_another_policy_only_what_fits_is_taken() -> None:
    function = ValueFunction(SPEC, dataclasses.replace(FRESH, init="policy"), module=OtherPolicy())
    state = function.state_dict()
    assert function.copied == 3  # scale and shift of the norm, bias of the state's layer
    assert (state["value/backbone.norm.weight"] == 3).all()
    assert (state["value/head_out.weight"] == 0).all()


def test_a_policy_with_other_settings_gets_the_default_sizes_and_its_own_statistics() -> None:
    assert encoder_settings({"checkpoint": "somewhere", "width": 2048}).width == 128
    assert encoder_settings(SPEC.config).width == 16
    bare = dataclasses.replace(SPEC, normalization={})
    function = ValueFunction(bare, FRESH)
    with pytest.raises(RunError, match="fit the value function first"):
        function.predict(EPISODES[0])
    function.fit(EPISODES)
    mean, std = function.state_dict()["value"]["statistics"]
    states = np.concatenate([episode.state for episode in EPISODES])
    np.testing.assert_allclose((mean, std), (states.mean(0), states.std(0)), rtol=1e-5)
    function.fit([telling_episode(3, state=np.full((12, 2), 50, np.float32))])
    assert function.state_dict()["value"]["statistics"] == [mean, std]


def test_the_longest_episodes_are_frozen_by_the_first_fit_that_sees_a_task() -> None:
    function = small_function()
    with pytest.raises(ValueError, match="does not know task 'push'"):
        function.returns(EPISODES[0])
    function.fit(EPISODES)
    longer = telling_episode(1, 30)
    function.fit([longer, telling_episode(1, 5, task="pull")])
    assert function.task_steps == {"push": 12, "pull": 5}
    assert function.returns(longer)[0] == -1
    assert function.returns(longer)[-2] == np.float32(-1 / 24)
    given = ValueFunction(SPEC, FRESH, task_steps={"push": 40})
    given.fit(EPISODES)
    assert given.task_steps == {"push": 40}


def test_advantages_use_the_functions_own_scale() -> None:
    function = ValueFunction(SPEC, FRESH, task_steps={"push": 5})
    found = function.advantages(make_episode("ppp"), np.asarray([-0.5, -0.4, -0.2], np.float32), 1)
    np.testing.assert_allclose(found, (-0.1 - 0.4 + 0.5, -0.1 - 0.2 + 0.4, 0.2), atol=1e-6)


def test_predictions_beside_a_fit_are_those_of_one_version() -> None:
    function = small_function(steps=25)
    function.fit(EPISODES)
    old, seen, done = function.predict(EPISODES[1]), [], threading.Event()

    def ask() -> None:
        while True:
            seen.append(function.predict(EPISODES[1]))
            if done.is_set():
                return

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    function.fit(EPISODES)
    done.set()
    for thread in threads:
        thread.join()
    new = function.predict(EPISODES[1])
    assert all(np.array_equal(one, old) or np.array_equal(one, new) for one in seen)
    assert not np.array_equal(old, new)


class Damaged(Sequence[Episode]):
    """Gives the episodes once, then one that does not fit the cameras."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return len(EPISODES)

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        if self.reads < 40:
            return EPISODES[index]
        return telling_episode(1, images={"front": np.zeros((12, 8, 16, 3), np.uint8)})


def test_a_fit_that_fails_changes_nothing() -> None:
    function = small_function(steps=50)
    state = function.state_dict()
    with pytest.raises(InvalidRecord, match=r"images.front.*uint8 \(16, 16, 3\), got uint8 \(8, 16, 3\)"):
        function.fit(Damaged())
    exploding = small_function(lr=1e30)
    with pytest.raises(RunError, match=r"not finite at step \d+ of the fit; nothing was changed; lower lr"):
        exploding.fit(EPISODES)
    for one in (function, exploding):
        assert (one.version, one.task_steps) == (0, {})
        assert all(np.array_equal(one.state_dict()[key], state[key]) for key in state if key != "value")


def test_what_cannot_be_learned_from_or_asked_is_refused() -> None:
    function = small_function()
    with pytest.raises(RunError, match="none of 1 episodes has a step to learn from"):
        function.fit([telling_episode(1, outcome=Outcome.ABORTED)])
    with pytest.raises(RunError, match="none of 0 episodes"):
        function.fit([])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        function.fit(EPISODES, steps=0)
    with pytest.raises(InvalidRecord, match="no such camera"):
        function.predict(telling_episode(1, images={"side": np.zeros((12, 16, 16, 3), np.uint8)}))
    with pytest.raises(InvalidRecord, match=r"state.*needs 2 elements"):
        function.predict(telling_episode(1, state=np.zeros((12, 3), np.float32)))


def test_wrong_settings_are_named() -> None:
    for setting, problem in (
        ({"num_bins": 1}, "num_bins must be at least 2, got 1"), ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"), ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"), ({"init": "zero"}, "init must be 'policy' or"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            ValueSettings(**setting)
    with pytest.raises(ValueError, match="init='policy' needs the policy's module"):
        ValueFunction(SPEC)
    with pytest.raises(ValueError, match="task_steps of 'push' must be at least 1, got 0"):
        ValueFunction(SPEC, FRESH, task_steps={"push": 0})
    half: PolicySpec = dataclasses.replace(SPEC, normalization={"state_mean": (0.0, 0.0)})
    with pytest.raises(ValueError, match="state_mean and state_std"):
        ValueFunction(half, FRESH)
