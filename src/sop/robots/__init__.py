"""Things that act. `make_robot` builds the robot that a configuration names.

To add a robot: write a subclass of `sop.robots.base.SimulatedRobot`, give it a function from `RobotConfig` to
robot below (import heavy packages inside it), and run `sop.testing.contracts.robot` over it.
"""

from collections.abc import Callable

from sop.config import RobotConfig
from sop.core.settings import suggestion
from sop.robots.base import DEPLOYMENT, LAB, RobotObservation, Scene, SimulatedRobot

__all__ = ["DEPLOYMENT", "LAB", "ROBOTS", "RobotObservation", "Scene", "SimulatedRobot", "make_robot"]


def _metaworld(config: RobotConfig) -> SimulatedRobot:
    from sop.robots.metaworld import MetaWorldRobot

    return MetaWorldRobot(image_size=config.image_size)


def _toy(config: RobotConfig) -> SimulatedRobot:
    from sop.robots.toy import ToyRobot

    return ToyRobot(image_size=config.image_size)


ROBOTS: dict[str, Callable[[RobotConfig], SimulatedRobot]] = {"metaworld": _metaworld, "toy": _toy}
"""Name in the configuration -> how to make the robot."""


def make_robot(config: RobotConfig) -> SimulatedRobot:
    """Make one robot; nothing moves before its `reset`. The caller closes it.

    Raises:
        ValueError: no robot has this name, or it does not know one of the configured tasks.
        RunError: the robot needs software that this machine lacks; says what to install.
    """
    if config.kind not in ROBOTS:
        raise ValueError(f"robot.kind: {config.kind!r} is not a robot. {suggestion(config.kind, ROBOTS)}")
    robot = ROBOTS[config.kind](config)
    for task in config.all_tasks:
        if task not in robot.tasks:
            known = robot.tasks
            robot.close()
            raise ValueError(f"robot tasks: {config.kind!r} knows no task {task!r}. {suggestion(task, known)}")
    return robot
