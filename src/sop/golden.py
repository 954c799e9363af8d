"""Golden observations: moments from the demonstrations that every version of a policy is asked about before a robot is.

    offline buffer -> N moments, spread over its episodes -> spare policy with the new weights -> actions [N, H, A]
                                                             the same noise for every version

Used by the publish gate (`sop.learner.publish_gate`), which compares the actions with those of the version before.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Observation
from sop.core.errors import RunError
from sop.core.experience import Library, Source
from sop.core.policy import Conditioning, Weights
from sop.learner.publish_gate import PublishGate, PublishGateSettings
from sop.policies import TrainablePolicy

_STRIDE = 7919
"""A prime: the moments lie anywhere in their episodes, the same ones every time."""


class GoldenActions:
    """What a policy with any weights plans for the golden observations: `PublishGate`'s `infer`. Not thread-safe.

    Args:
        library: its offline buffer is looked at when the first weights are judged.
        policy: a spare one; its weights are overwritten.
        conditioning: what the fleet asks for, at that moment.
        count: N.

    Raises:
        RunError: when it is called and the offline buffer is empty.
    """

    def __init__(
        self,
        library: Library,
        policy: TrainablePolicy,
        conditioning: Callable[[], Conditioning],
        count: int,
    ) -> None:
        self._library = library
        self._policy = policy
        self._conditioning = conditioning
        self._count = count
        self._moments: Sequence[tuple[Observation, str]] = ()

    def __call__(self, weights: Weights) -> npt.NDArray[np.float32]:
        """Actions [N, H, A] in action units; finite or not. Blocks for one inference.

        Args:
            weights: of every tensor of the policy.
        """
        if not self._moments:
            self._moments = golden_moments(self._library, self._count)
        self._policy.load(weights, 0)
        observations, instructions = zip(*self._moments, strict=True)
        noise = [np.random.default_rng(number) for number in range(len(observations))]
        return self._policy.infer_many(observations, instructions, self._conditioning(), noise)


def golden_moments(library: Library, count: int) -> list[tuple[Observation, str]]:
    """Observations with their instructions from the offline buffer: evenly over its episodes, always the same ones.

    Raises:
        RunError: there is no episode.
    """
    keys = sorted(library.keys(Source.OFFLINE))
    if not keys:
        raise RunError("no golden observations: the offline buffer is empty; set learner.golden_observations=0")
    moments = []
    for number in range(count):
        episode = library.get(keys[number * len(keys) // count])
        step = number * _STRIDE % episode.num_steps
        images = {camera: episode.frame(camera, step) for camera in episode.cameras}
        moments.append((Observation(images, episode.state[step]), episode.instruction))
    return moments


def make_publish_gate(
    library: Library, policy: TrainablePolicy, conditioning: Callable[[], Conditioning], count: int
) -> PublishGate:
    """The gate of a run's learner.

    Args:
        library, policy, conditioning, count: see `GoldenActions`.
    """
    return PublishGate(PublishGateSettings(), policy.spec, GoldenActions(library, policy, conditioning, count))
