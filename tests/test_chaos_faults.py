"""The table of faults is true: fifty of them, every test it names exists, and the page in docs has the same rows."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from recovery_times import Recovery
from sop.chaos import drill
from sop.chaos.drill import Result, as_json, as_markdown, as_text, check_faults, read_results
from sop.chaos.fault import Fault
from sop.chaos.faults import FAULTS
from sop.cli import main
from sop.core.errors import RunError

ROOT = Path(__file__).parents[1]


def test_there_are_fifty_and_each_has_a_test_or_a_reason() -> None:
    assert [fault.number for fault in FAULTS] == list(range(1, 51))
    for fault in FAULTS:
        assert bool(fault.tests) != bool(fault.why_not), fault.number
        assert fault.title, fault.number
        assert fault.required, fault.number
        assert fault.lost, fault.number
        assert fault.recovery, fault.number
    assert sum(bool(fault.tests) for fault in FAULTS) >= 40
    assert len({fault.title for fault in FAULTS}) == 50


def test_every_test_that_is_named_exists() -> None:
    """By the source, so that a name is checked in every run; `--check` asks pytest itself."""
    for node in sorted({test for fault in FAULTS for test in fault.tests}):
        path, function = node.split("::")
        functions = {
            item.name for item in ast.parse((ROOT / path).read_text()).body if isinstance(item, ast.FunctionDef)
        }
        assert function in functions, f"{node} is in the table of faults and nowhere else"


@pytest.mark.slow
def test_pytest_finds_every_test_that_is_named() -> None:
    nodes = sorted({test for fault in FAULTS for test in fault.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *nodes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {line.split("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == set(nodes)


def test_the_page_has_the_rows_of_the_table() -> None:
    """`sop chaos --list --markdown` makes them, with the figures of the results that are kept beside the page."""
    page = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    for fault, row in zip(FAULTS, as_markdown(read_results(ROOT / "docs")).splitlines()[2:], strict=True):
        mine = [line for line in page if line.startswith(f"| {fault.number} | ")]
        assert len(mine) == 1, f"fault {fault.number} is {len(mine)} times in docs/reliability.md"
        assert mine[0] == row, "docs/faults.json is a copy of runs/chaos/faults.json; then `--list --markdown` again"


def test_the_results_beside_the_page_are_of_every_fault_and_all_passed() -> None:
    kept = read_results(ROOT / "docs")
    assert {number: result.result for number, result in kept.items()} == {
        fault.number: "passed" for fault in FAULTS if fault.tests
    }
    assert {result.recovery_clock for result in kept.values() if result.recovery_s is not None} == {"wall", "injected"}
    assert all(result.recovery_until for result in kept.values() if result.recovery_s is not None)


def test_the_list_says_number_test_and_last_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["number"] for row in rows] == list(range(1, 51))
    assert {"title", "required", "tests", "why_no_test", "command", "result", "recovery_s"} <= rows[0].keys()
    last = result_of(1.5, "wall")
    assert json.loads(as_json({1: last}))[0]["recovery_s"] == 1.5
    assert json.loads(as_json({1: last}))[0]["recovery_until"] == "all is there"
    assert as_text({1: last}).startswith("  1  passed ")


def result_of(seconds: float, clock: str) -> Result:
    return Result(
        title=FAULTS[0].title, result="passed", recovery_s=seconds, recovery_clock=clock, recovery_until="all is there"
    )


@pytest.mark.parametrize(
    ("seconds", "clock", "words"),
    [
        (0.00042, "wall", "(measured: 0.42 ms until all is there)"),
        (0.0321, "wall", "(measured: 32 ms until all is there)"),
        (1.54, "wall", "(measured: 1.5 s until all is there)"),
        (30.2, "injected", "(measured: 30 s until all is there, injected clock)"),
        (123.4, "wall", "(measured: 123 s until all is there)"),
    ],
)
def test_a_figure_says_until_what_and_whether_the_clock_was_the_walls(seconds: float, clock: str, words: str) -> None:
    assert f"{FAULTS[0].recovery} {words} | " in as_markdown({1: result_of(seconds, clock)})
    assert "(measured" not in as_markdown({1: Result(title="", result="passed")})


THREE = (
    Fault(
        number=1, title="a", required="x", tests=("tests/test_three.py::test_good", "tests/test_three.py::test_many")
    ),
    Fault(number=2, title="b", required="x", tests=("tests/test_three.py::test_bad",)),
    Fault(number=3, title="c", required="x", tests=("tests/test_three.py::test_long",)),
    Fault(number=4, title="d", required="x", why_not="because"),
)


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with tests of four faults."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_three.py").write_text(
        "import pytest\n"
        "def told(record, seconds, clock, until):\n"
        "    record('recovery_s', seconds); record('recovery_clock', clock); record('recovery_until', until)\n"
        "def test_good(record_property):\n"
        "    told(record_property, 0.5, 'wall', 'x'); told(record_property, 2.5, 'injected', 'y')\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_many(n, record_property): told(record_property, n, 'wall', 'z')\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.slow\ndef test_long(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nmarkers = slow: long\n")
    monkeypatch.setattr(drill, "SOURCE", tmp_path)
    monkeypatch.setattr(drill, "FAULTS", THREE)
    return tmp_path


def test_results_are_those_of_the_tests_and_are_kept(three: Path) -> None:
    found = check_faults(three / "runs", fast=True)
    assert {number: result.result for number, result in found.items()} == {1: "passed", 2: "failed", 3: "not run"}
    assert (found[1].recovery_s, found[1].recovery_clock, found[1].recovery_until) == (2.5, "injected", "y")
    assert (found[2].recovery_s, found[2].recovery_clock) == (None, "")
    assert check_faults(three / "runs", numbers=(3,))[3].result == "passed"
    kept = read_results(three / "runs")
    assert {number: result.result for number, result in kept.items()} == {1: "passed", 2: "failed", 3: "passed"}
    assert kept[1].tests == dict.fromkeys(THREE[0].tests, "passed")


def test_what_cannot_be_checked_is_said(three: Path) -> None:
    with pytest.raises(ValueError, match="no fault 77"):
        check_faults(three / "runs", numbers=(77,))
    (three / "tests" / "test_three.py").unlink()
    with pytest.raises(RunError, match="needs the source tree"):
        check_faults(three / "runs")
    (three / "runs").mkdir()
    (three / "runs" / "faults.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        read_results(three / "runs")


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos"]) == 2
    assert "name a run" in capsys.readouterr().err
    assert main(["chaos", "nowhere"]) == 1
    assert "is not the folder of a run" in capsys.readouterr().err


def test_what_a_test_measures_has_a_clock_and_words() -> None:
    told: list[tuple[str, object]] = []
    recovery, now = Recovery(lambda *pair: told.append(pair)), [0.0]
    recovery.fault_is_over(lambda: now[0])
    now[0] = 7.0
    recovery.fault_is_over(lambda: now[0])  # it was not over yet
    now[0] = 10.0
    recovery.whole("it is")
    assert told == [("recovery_s", 3.0), ("recovery_clock", "injected"), ("recovery_until", "it is")]
    with pytest.raises(AssertionError, match="the fault is not over"):
        recovery.whole("it is")
    recovery.fault_is_over()
    recovery.whole("it is")
    assert told[4] == ("recovery_clock", "wall")
