"""`sop actor`, `sop clear`, `sop learner`, `sop evaluate`: the processes of a run, one by one."""

import argparse
from pathlib import Path


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`sop actor`, `sop clear`, `sop learner` and `sop evaluate`."""
    actor = commands.add_parser("actor", help="one robot's process")
    actor.add_argument("run", help="folder of the run, or URL of its store")
    actor.add_argument("--bus", help="URL of the bus (default: beside the store)")
    actor.add_argument("--id", required=True, help="unique in the run, e.g. robot-7")
    instead = actor.add_mutually_exclusive_group()
    instead.add_argument("--demonstrate", action="store_true", help="the expert drives, in the lab")
    instead.add_argument("--rollout", action="store_true", help="the base policy drives, nobody corrects (id: base-N)")
    actor.add_argument("--channel", default="train", help="which policies it runs: train (default) or prod")
    actor.add_argument("--limits", type=Path, metavar="FILE", help="limits of this robot, checked at every step")
    actor.add_argument("--speed", type=float, help="robot seconds per second (default: the run's)")
    actor.add_argument("--end", type=int, metavar="N", help="stop when N episodes are recorded in all")
    actor.set_defaults(command=_actor)
    clear = commands.add_parser("clear", help="let a robot move again that stopped itself, after somebody has looked")
    clear.add_argument("run", help="as given to `sop actor`: folder of the run, or URL of its store")
    clear.add_argument("--id", required=True, help="of the robot")
    clear.add_argument("--operator", required=True, metavar="NAME", help="who has looked; is written down")
    clear.set_defaults(command=_clear)
    learner = commands.add_parser("learner", help="the learner's process; resumes from the last checkpoint")
    learner.add_argument("run", help="folder of the run, or URL of its store")
    learner.add_argument("--bus", help="URL of the bus (default: beside the store)")
    learner.add_argument(
        "--stay", action="store_true", help="when all is learned, index what still comes until stopped"
    )
    before = learner.add_mutually_exclusive_group()
    before.add_argument("--pretrain", action="store_true", help="make the base policy (version 0) and end")
    before.add_argument("--warmup", action="store_true", help="get the algorithm ready (version 1) and end")
    learner.set_defaults(command=_learner)
    evaluate = commands.add_parser("evaluate", help="judge a published policy on held-out seeds")
    evaluate.add_argument("run", help="folder of the run, or URL of its store")
    evaluate.add_argument("--bus", help="URL of the bus (default: beside the store)")
    evaluate.add_argument("--version", type=int, help="policy version (default: the newest)")
    evaluate.add_argument("--name", default="final", help="base, final, progress or expert (default final)")
    evaluate.add_argument("--ask", help="good, bad or nothing, instead of what the policy's manifest says (RECAP)")
    evaluate.add_argument("--guidance", type=float, default=1.0, help="beta of what is asked for (default 1)")
    evaluate.add_argument("--workers", type=int, default=1, help="processes")
    evaluate.add_argument("--part", metavar="I/N", help="evaluate every N-th episode and print the result as JSON")
    evaluate.add_argument("--follow", action="store_true", help="evaluate each newest version until stopped")
    evaluate.set_defaults(command=_evaluate)


def _actor(options: argparse.Namespace) -> int:
    from sop.processes import stop_on_signals, stop_with_parent
    from sop.runs import open_run
    from sop.system import ActorOptions, run_actor

    stop = stop_on_signals()
    stop_with_parent()
    who = ActorOptions(
        actor_id=options.id,
        demonstrate=options.demonstrate,
        rollout=options.rollout,
        speed=options.speed,
        end_sequence=options.end,
        channel=options.channel,
        limits=options.limits,
    )
    run_actor(open_run(options.run, options.bus), who, stop)
    return 0


def _clear(options: argparse.Namespace) -> int:
    from sop.core.clock import SystemClock
    from sop.robot_wiring import open_latch
    from sop.runs import open_run

    latch = open_latch(open_run(options.run), options.id, SystemClock())
    if not latch.reason:
        print(f"{options.id} is not stopped.")
        return 0
    print(f"{options.id} was stopped: {latch.reason}. {options.operator} lets it move again.")
    latch.clear(options.operator)
    return 0


def _learner(options: argparse.Namespace) -> int:
    from sop import system
    from sop.processes import stop_on_signals, stop_with_parent
    from sop.runs import open_run

    stop = stop_on_signals()
    stop_with_parent()
    run = open_run(options.run, options.bus)
    if options.pretrain:
        system.run_pretraining(run, stop)
    elif options.warmup:
        system.run_warmup(run, stop)
    else:
        system.run_learner(run, stop, stays=options.stay)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from sop.evaluator import asking, evaluate, evaluate_part, follow, make_request, newest_version
    from sop.processes import stop_on_signals, stop_with_parent
    from sop.runs import open_run

    stop = stop_on_signals()
    stop_with_parent()
    run = open_run(options.run, options.bus)
    if options.follow:
        follow(run, stop)
        return 0
    version = newest_version(run) if options.version is None else options.version
    request = make_request(run, options.name, version)
    if options.ask is not None:
        request = asking(request, options.ask, options.guidance)
    if options.part:
        part, _, parts = options.part.partition("/")
        print(evaluate_part(run, request, int(part), int(parts)).to_json().decode())
        return 0
    result = evaluate(run, request, workers=options.workers, stop=stop)
    for task, outcome in result.tasks.items():
        low, high = outcome.interval
        print(f"{task:24s} {outcome.success:5.2f}  [{low:.2f}, {high:.2f}]  {outcome.episodes} episodes")
    return 0
