"""One rank of a learner for tests: trains the sessions that a file of JSON describes, one after the other.

RANK=... WORLD_SIZE=... python tests/rank_worker.py RUN SESSIONS
"""

import json
import sys
import threading
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sop.buffer import IndexSegments
from sop.config import LearnerConfig
from sop.core.experience import Collection, Windows
from sop.learner import Checkpoint, CheckpointStore, Learner
from sop.learner.follower import follow
from sop.learner.learner import LearnerParts
from sop.learner.ranks import OneRank, open_ranks
from sop.policies import conditioned
from sop.runs import Run, open_run
from sop.system import make_learner_policy
from sop.transport import DirectoryStore
from sop.wiring import follower_parts, learner_parts


@dataclass(frozen=True, kw_only=True)
class Session:
    """One training."""

    steps: int
    """Learner steps at its end."""
    save: str
    """Folder of a store: gets the checkpoint of the end."""
    parallel: str = "replicate"
    resume: str | None = None
    """Folder of a store: goes on with its checkpoint."""
    publish: bool = False

    @property
    def seen(self) -> Path:
        """What the sampler was told, as JSON."""
        return Path(self.save) / "seen.json"


def checkpoints(folder: str) -> CheckpointStore:
    store = DirectoryStore(Path(folder))
    return CheckpointStore(store, IndexSegments(store, "0" * 32))


def saved(folder: str) -> Checkpoint:
    with closing(checkpoints(folder)) as store:
        found = store.newest()
    assert found is not None
    return found


def settings(run: Run, session: Session) -> LearnerConfig:
    return replace(
        run.config.learner,
        batch_size=8,
        parallel=session.parallel,
        offline_steps=session.steps,
        checkpoint_every=10**6,
        publish_every=10**6,
        decode_workers=0,
        device="cpu",
        max_skipped_steps=1000,
    )


def train(run: Run, session: Session, parts: LearnerParts) -> None:
    """Rank 0."""
    learner = Learner(parts, settings(run, session), target_episodes=None)
    if session.resume is None:
        keys = [*run.store.keys("demonstrations/"), *run.store.keys("episodes/")]
        parts.books.index(parts.ingest.take(keys))
        learner.share_state()
    else:
        learner.restore(saved(session.resume))
    told: list[dict[str, Any]] = []
    observe = parts.sampler.observe

    def note(windows: Windows, losses: np.ndarray) -> None:
        told.append({"start": windows.start.tolist(), "task": windows.task.tolist(), "losses": losses.tolist()})
        observe(windows, losses)

    parts.sampler.observe = note  # type: ignore[method-assign]
    parts.publisher.continue_from_step(learner.step)
    learner.train(threading.Event())
    if session.publish:
        learner.publish()
    with closing(checkpoints(session.save)) as store:
        store.save(learner.checkpoint())
    session.seen.write_text(json.dumps(told))


def run_sessions(run: Run, sessions: list[Session]) -> None:
    """On every rank."""
    with open_ranks(torch.device("cpu")) as ranks:
        for session in sessions:
            config = settings(run, session)
            policy, algorithm = make_learner_policy(run)
            policy = conditioned(policy, {"precision": "float32"}, 0)
            algorithm.collection = Collection.NOTHING  # type: ignore[misc]
            if isinstance(ranks, OneRank) or ranks.rank == 0:
                with learner_parts(run, policy, algorithm, config, ranks=ranks) as parts:
                    train(run, session, parts)
            else:
                with follower_parts(run, policy, algorithm, config, ranks) as following:
                    follow(following, ranks, threading.Event())
            if not isinstance(ranks, OneRank):
                ranks.sharded = False  # the next session decides


def write_sessions(path: Path, sessions: list[Session]) -> None:
    path.write_text(json.dumps([asdict(session) for session in sessions]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_sessions(open_run(sys.argv[1]), [Session(**one) for one in json.loads(Path(sys.argv[2]).read_text())])
