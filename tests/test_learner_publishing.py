"""What the gate refuses is not published, and nothing that was learned is lost from the lineage."""

import threading
from dataclasses import replace
from typing import Any

import pytest

from sop.broadcast import fetch_policy, published_versions
from sop.core import layout
from sop.core.lineage import Lineage
from sop.core.policy import Weights
from sop.learner import Learner
from sop.learner.publish_gate import Verdict
from sop.runs import Run
from sop.system import make_learner_policy
from sop.wiring import learner_parts


class Doorman:
    """A gate that refuses what it is told to: the first version, the second, ..."""

    def __init__(self, *refused: int) -> None:
        self.refused = refused
        self.asked = 0

    def check(self, weights: Weights) -> Verdict:
        assert weights
        self.asked += 1
        bad = self.asked in self.refused
        return Verdict(reasons=("it is too large", "it is late") if bad else (), measures={"update_norm": 1.5})

    def state_dict(self) -> dict[str, Any]:
        return {"norms": [], "refusals": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["refusals"]


def test_a_refused_version_is_not_published_and_its_draws_belong_to_the_next(
    finished_base: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run, gate = finished_base, Doorman(1)
    before = list(published_versions(run.store))
    policy, algorithm = make_learner_policy(run)
    config = replace(run.config.learner, publish_every=4, cooldown_steps=6, checkpoint_every=10**6)
    with learner_parts(run, policy, algorithm, config) as opened:
        parts = replace(opened, gate=gate)
        learner = Learner(parts, config, target_episodes=0)
        parts.books.index(parts.ingest.take(sorted(run.store.keys("demonstrations/"))))
        learner.run(threading.Event())
        steps, checkpoint = learner.step, learner.checkpoint()
    new = [version for version in published_versions(run.store) if version not in before]
    assert [fetch_policy(run.store, version)[0].learner_step for version in new] == [steps]
    lineage = Lineage.decode(run.store.get(layout.policy_lineage(new[0])))
    assert [draw.learner_step for draw in lineage.draws] == list(range(1, steps + 1))
    assert (gate.asked, steps) == (2, 6)
    assert "step 4 is not published: it is too large; it is late" in caplog.text
    assert checkpoint.state["publish_gate"] == {"norms": [], "refusals": 2}
    metrics = (run.folder / "metrics" / "learner.jsonl").read_text()
    assert metrics.count('"publish_gate/refused"') == 2
