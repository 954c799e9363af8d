"""Child processes and the command line: restarted, stopped by id, quick to help, clear about mistakes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sop.cli import main
from sop.core.errors import Forbidden, RunError, Untrusted
from sop.processes import Children, Job, child_environment, say_at_work


def run_code(children: Children, name: str, code: str, *, restart: bool = False, dispensable: bool = False) -> None:
    """Start a child that runs `code` instead of the `sop` command."""

    def spawn(job: Job) -> "subprocess.Popen[bytes]":
        with job.output.open("ab") as output:
            return subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)

    children.spawn = spawn
    children.start(name, [], restart=restart, dispensable=dispensable)


def wait_for(condition: object, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what} did not happen"
        os.sched_yield()


def test_a_killed_child_is_started_again_and_said_so(tmp_path: Path) -> None:
    notes: list[str] = []
    children = Children(tmp_path, on_restart=notes.append)
    run_code(children, "sleeper", "import time; time.sleep(60)", restart=True)
    first = children.pid("sleeper")
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    children.watch()
    assert children.pid("sleeper") != first
    assert notes == ["sleeper died (code -9) and was started again"]
    assert not children.finished("sleeper")
    children.stop_all()
    assert children.finished("sleeper")


def test_a_child_that_may_not_fail_ends_the_run_with_its_log(tmp_path: Path) -> None:
    children = Children(tmp_path)
    run_code(children, "worker", "raise SystemExit('the reason')")
    children._children["worker"].process.wait(20)
    with pytest.raises(RunError, match=r"worker ended with code 1(?s:.*)the reason"):
        children.watch()


def test_a_child_that_was_told_something_impossible_is_not_started_again(tmp_path: Path) -> None:
    children = Children(tmp_path)
    code = "import sys; print('sop learner: no such setting', file=sys.stderr); sys.exit(2)"
    run_code(children, "learner", code, restart=True)
    children._children["learner"].process.wait(20)
    with pytest.raises(RunError, match=r"learner ended with code 2(?s:.*)no such setting"):
        children.watch()


class Clock:
    """Monotonic seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def die(children: Children, name: str, clock: Clock, times: int) -> None:
    """Let a child die so often, each time after 20 s, and wait out every pause."""
    for _ in range(times):
        children._children[name].process.wait(20)
        clock.now_s += 20
        children.watch()
        clock.now_s += 30
        children.watch()


def test_a_robot_that_fails_at_its_start_again_and_again_is_left_alone_while_another_works(tmp_path: Path) -> None:
    notes: list[str] = []
    clock = Clock()
    children = Children(tmp_path, on_restart=notes.append, clock=clock)
    run_code(children, "robot-0", "import time; time.sleep(60)", restart=True, dispensable=True)
    run_code(children, "robot-1", "raise SystemExit('the camera is away')", restart=True, dispensable=True)
    die(children, "robot-1", clock, 8)
    again = "robot-1 ended with code 1, {} times in a row without having done anything useful, and is "
    assert notes == [
        "robot-1 died (code 1) and was started again",
        *(again.format(n + 2) + f"started again in {pause} s" for n, pause in enumerate((1, 2, 4, 8, 16, 30))),
        again.format(8) + "left alone: the camera is away",
    ]
    die(children, "robot-1", clock, 1)
    assert len(notes) == 8
    assert not children.finished("robot-0")
    children.stop_all()


def test_the_last_robot_that_fails_at_its_start_ends_the_run(tmp_path: Path) -> None:
    clock = Clock()
    children = Children(tmp_path, clock=clock)
    run_code(children, "learner", "import time; time.sleep(60)", restart=True)
    for name in ("robot-0", "robot-1"):
        run_code(children, name, "raise SystemExit('the store refuses us')", restart=True, dispensable=True)
    children._children["robot-0"].left_alone = True
    with pytest.raises(RunError, match=r"robot-1 ended with code 1(?s:.*)the store refuses us"):
        die(children, "robot-1", clock, 8)
    children.stop_all()


def test_a_child_that_dies_again_waits_for_its_turn(tmp_path: Path) -> None:
    clock = Clock()
    children = Children(tmp_path, clock=clock)
    run_code(children, "learner", "raise SystemExit(1)", restart=True)
    die(children, "learner", clock, 1)
    dead = children.pid("learner")
    children._children["learner"].process.wait(20)
    children.watch()
    clock.now_s += 0.9
    children.watch()
    assert children.pid("learner") == dead
    clock.now_s += 0.1
    children.watch()
    assert children.pid("learner") != dead
    children.stop_all()


@pytest.mark.parametrize(("says", "lives_s"), [("from sop.processes import say_at_work; say_at_work()", 20), ("", 601)])
def test_a_child_that_did_something_useful_is_started_again_at_once_however_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, lives_s: int
) -> None:
    monkeypatch.setenv("SOP_PARENT_PID", str(os.getpid()))
    notes: list[str] = []
    clock = Clock()
    children = Children(tmp_path, on_restart=notes.append, clock=clock)
    run_code(children, "robot-0", f"{says}\nraise SystemExit(1)", restart=True)
    for _ in range(9):
        children._children["robot-0"].process.wait(20)
        clock.now_s += lives_s
        children.watch()
    assert notes == ["robot-0 died (code 1) and was started again"] * 9
    children.stop_all()


def test_work_is_said_once_and_to_a_parent_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for parent, said in (("", ""), ("1", "sop: at work\n")):
        say_at_work.cache_clear()
        monkeypatch.setenv("SOP_PARENT_PID", parent) if parent else monkeypatch.delenv("SOP_PARENT_PID", raising=False)
        say_at_work()
        say_at_work()
        assert capsys.readouterr().out == said
    say_at_work.cache_clear()


def test_a_robot_that_is_refused_is_not_started_again(tmp_path: Path) -> None:
    notes: list[str] = []
    children = Children(tmp_path, on_restart=notes.append)
    run_code(children, "robot-0", "import time; time.sleep(60)", restart=True, dispensable=True)
    code = "import sys; print('sop actor: run.json: revoked', file=sys.stderr); sys.exit(3)"
    run_code(children, "robot-1", code, restart=True, dispensable=True)
    children._children["robot-1"].process.wait(20)
    children.watch()
    children.watch()
    assert notes == ["robot-1 ended with code 3, for good, and is left alone: sop actor: run.json: revoked"]
    children._children["robot-0"].left_alone = True
    children._children["robot-1"].left_alone = False
    with pytest.raises(RunError, match=r"robot-1 ended with code 3, for good(?s:.*)revoked"):
        children.watch()
    children.stop_all()


@pytest.mark.parametrize(
    ("error", "code"),
    [(Forbidden("revoked"), 3), (Untrusted("not signed"), 3), (ValueError("2"), 2), (RunError("lease"), 1)],
)
def test_a_process_says_by_its_code_whether_starting_it_again_is_useless(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("sop.runs.open_run", refuse)
    assert main(["learner", "somewhere"]) == code


def test_only_who_is_named_is_stopped(tmp_path: Path) -> None:
    children = Children(tmp_path)
    for name in ("robot-0", "learner"):
        run_code(children, name, "import time; time.sleep(60)")
    children.stop()
    children.stop(*[])
    children.watch()
    assert not children.finished("robot-0")
    children.stop("robot-0")
    assert children.finished("robot-0")
    assert not children.finished("learner")
    children.stop_all()
    assert children.finished("learner")


def test_a_child_that_fails_when_it_is_asked_to_finish_is_started_again_and_can_be_asked_again(tmp_path: Path) -> None:
    notes: list[str] = []
    children = Children(tmp_path, on_restart=notes.append)
    ready, failed = tmp_path / "ready", tmp_path / "failed"
    code = f"""if True:
        import pathlib, signal, sys, time
        def finish(*_):
            if pathlib.Path({str(failed)!r}).exists():
                sys.exit(0)
            pathlib.Path({str(failed)!r}).touch()
            sys.exit(1)
        signal.signal(signal.SIGTERM, finish)
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(60)
    """
    run_code(children, "learner", code, restart=True)
    for _ in range(2):
        wait_for(ready.exists, "the start")
        ready.unlink()
        process = children._children["learner"].process
        children.ask_to_finish("learner")
        process.wait(20)
        children.watch()
    assert notes == ["learner died (code 1) and was started again"]
    assert children.finished("learner")
    children.ask_to_finish("learner")
    children.ask_to_finish("nobody")


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    children = Children(tmp_path)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True); time.sleep(60)"
    )
    run_code(children, "deaf", code)
    pid = children.pid("deaf")
    wait_for(lambda: "deaf" in children.log_tail("deaf"), "the start")
    children.stop("deaf", timeout_s=0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_children_are_told_who_their_parent_is_and_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = child_environment({"A": "b"})
    assert environment["SOP_PARENT_PID"] == str(os.getpid())
    assert (environment["OMP_NUM_THREADS"], environment["A"]) == ("1", "b")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["inspect", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom sop.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'pyarrow', 'rich', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: sop" in result.stdout
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "metaword"], 2, "Did you mean 'metaworld'"),
        (["run", "debug", "--set", "learner.lrr=3"], 2, "Did you mean 'lr'"),
        (["run", "debug", "--algorithm", "hgdagger", "--runs", "{tmp}"], 2, "Did you mean 'hg_dagger'"),
        (["run", "debug", "--set", "policy.kind=flow_vlaa", "--runs", "{tmp}"], 2, "Did you mean 'flow_vla'"),
        (["run", "debug", "--set", "policy.settings.widht=3", "--runs", "{tmp}"], 2, "Did you mean 'width'"),
        (["run", "debug", "--set", "operator.kind=nobody", "--runs", "{tmp}"], 2, "Known are: none, stand_in"),
        (["run", "debug", "--set", 'robot.fleet_tasks=["touch-rad"]', "--runs", "{tmp}"], 2, "'touch-red'"),
        (["run", "debug", "--resume", "--runs", "{tmp}"], 1, "holds no run of the preset 'debug'"),
        (["learner", "{tmp}/nothing"], 1, "is not the folder of a run"),
        (["inspect", "{tmp}"], 1, "is not the folder of a run"),
        (["evaluate", "file://{tmp}/none"], 1, "holds no run"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(filled) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*/store"))  # nothing was begun
