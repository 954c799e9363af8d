"""Runs the tests of the faults and keeps what came out: `sop chaos --check`, `sop chaos --list`.

    FAULTS -> pytest, once for all of them -> runs/chaos/faults.json -> table, JSON, docs/reliability.md

A test says how long recovery took with three properties: `recovery_s`, `recovery_clock` ("wall", or "injected": a
clock of the test's that the system went by) and `recovery_until` (what was whole again). Of several the longest counts.
The table in docs is made from docs/faults.json, a copy of the results of one machine.
"""

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from sop.chaos.fault import Fault
from sop.chaos.faults import FAULTS
from sop.core.errors import RunError

RESULTS = "faults.json"
SOURCE = Path(__file__).parents[3]
"""Root of the source tree: the tests are there and nowhere else."""
NOT_RUN = "not run"
_ORDER = ("failed", NOT_RUN, "skipped", "passed")
"""The result of a fault is the first of these that one of its tests has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the tests of a fault said the last time."""

    title: str
    result: str
    """passed, failed, skipped or not run."""
    seconds: float = 0.0
    """All its tests together."""
    recovery_s: float | None = None
    """The longest recovery that a test measured; None when none measured one."""
    recovery_clock: str = ""
    """wall, or injected: the seconds are those of a clock that the test moved as the running code waited."""
    recovery_until: str = ""
    """What was right again then."""
    utc: str = ""
    tests: dict[str, str] = field(default_factory=dict)
    """Node id -> its result."""


@dataclass(frozen=True, slots=True, order=True)
class _Recovery:
    """What a test measured."""

    seconds: float
    clock: str
    until: str


@dataclass(frozen=True, slots=True)
class _Case:
    """One executed test."""

    result: str
    seconds: float
    recovery: _Recovery | None


def read_results(runs: Path) -> dict[int, Result]:
    """The last results by number; none when nothing was ever checked.

    Raises:
        RunError: the file is damaged.
    """
    path = runs / RESULTS
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[int, Result])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it, then `sop chaos --check`") from error


def check_faults(runs: Path, *, numbers: tuple[int, ...] = (), fast: bool = False) -> dict[int, Result]:
    """Run the tests of these faults, or of all (blocking, minutes), and keep the results.

    Args:
        runs: folder of `faults.json`; the results of other faults in it stay.
        numbers: of faults.
        fast: leave out the tests that are marked as slow.

    Returns:
        The new results by number.

    Raises:
        ValueError: a number that there is not.
        RunError: the tests are not there, or pytest did not run.
    """
    if unknown := sorted(set(numbers) - {fault.number for fault in FAULTS}):
        raise ValueError(f"there is no fault {unknown[0]}: they are 1 to {len(FAULTS)}")
    chosen = [fault for fault in FAULTS if fault.tests and (not numbers or fault.number in numbers)]
    cases = _run_tests({test for fault in chosen for test in fault.tests}, fast=fast)
    utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    results = {fault.number: _result(fault, cases, utc) for fault in chosen}
    runs.mkdir(parents=True, exist_ok=True)
    merged = dict(sorted({**read_results(runs), **results}.items()))
    (runs / RESULTS).write_bytes(msgspec.json.format(msgspec.json.encode(merged), indent=2))
    return results


def _run_tests(tests: Collection[str], *, fast: bool) -> dict[str, list[_Case]]:
    """Node id without parameters -> what its cases said."""
    missing = sorted({test.split("::")[0] for test in tests if not (SOURCE / test.split("::")[0]).is_file()})
    if missing:
        raise RunError(f"{SOURCE / missing[0]} is missing: `sop chaos --check` needs the source tree and its tests")
    chosen = sorted(tests, key=_place)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-o", "junit_family=xunit1", *chosen]  # xunit2 has no place for what tests measured
        done = subprocess.run(command + (["-m", "not slow"] if fast else []), cwd=SOURCE, check=False)
        if done.returncode not in (0, 1) or not report.exists():
            raise RunError(f"pytest ended with code {done.returncode} and without results")
        found: dict[str, list[_Case]] = {}
        for name, case in _read_report(report):
            found.setdefault(name, []).append(case)
        return found


def _place(test: str) -> tuple[str, int]:
    """Where a test stands in its file: tests that share a server run in that order."""
    path, name = test.split("::")
    return path, (SOURCE / path).read_text().find(f"def {name}(")


def _read_report(path: Path) -> Iterator[tuple[str, _Case]]:
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 - pytest wrote it a moment ago
        module, function = case.get("classname", ""), case.get("name", "").split("[")[0]
        bad = case.find("failure") is not None or case.find("error") is not None
        result = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        node = f"{module.replace('.', '/')}.py::{function}"
        yield node, _Case(result, float(case.get("time", 0)), max(_recoveries(case), default=None))


def _recoveries(case: ET.Element) -> list[_Recovery]:
    told: dict[str, list[str]] = {"recovery_s": [], "recovery_clock": [], "recovery_until": []}
    for entry in case.iter("property"):
        told.get(entry.get("name", ""), []).append(entry.get("value", ""))
    return [_Recovery(round(float(took), 6), clock, until) for took, clock, until in zip(*told.values(), strict=True)]


def _result(fault: Fault, cases: Mapping[str, list[_Case]], utc: str) -> Result:
    tests = {test: _worst([case.result for case in cases.get(test, [])] or [NOT_RUN]) for test in fault.tests}
    own = [case for test in fault.tests for case in cases.get(test, [])]
    longest = max((case.recovery for case in own if case.recovery is not None), default=None)
    return Result(
        title=fault.title,
        result=_worst(list(tests.values())),
        seconds=round(sum(case.seconds for case in own), 2),
        recovery_s=None if longest is None else longest.seconds,
        recovery_clock="" if longest is None else longest.clock,
        recovery_until="" if longest is None else longest.until,
        utc=utc,
        tests=tests,
    )


def _worst(results: list[str]) -> str:
    return min(results, key=_ORDER.index)


def as_json(results: Mapping[int, Result]) -> str:
    """Every fault with its tests and last result."""
    rows = []
    for fault in FAULTS:
        last = results.get(fault.number)
        rows.append(
            {
                "number": fault.number,
                "title": fault.title,
                "required": fault.required,
                "tests": list(fault.tests),
                "why_no_test": fault.why_not,
                "command": fault.command,
                "lost": fault.lost,
                "recovery": fault.recovery,
                "result": NOT_RUN if last is None else last.result,
                "checked_utc": "" if last is None else last.utc,
                "recovery_s": None if last is None else last.recovery_s,
                "recovery_clock": "" if last is None else last.recovery_clock,
                "recovery_until": "" if last is None else last.recovery_until,
            }
        )
    return msgspec.json.format(msgspec.json.encode(rows), indent=2).decode()


def as_text(results: Mapping[int, Result]) -> str:
    """A line per fault, its tests below."""
    lines = []
    for fault in FAULTS:
        last = results.get(fault.number)
        lines.append(f"{fault.number:3d}  {NOT_RUN if last is None else last.result:8s} {fault.title}")
        lines += [f"       {test}" for test in fault.tests] or [f"       no test: {fault.why_not}"]
    return "\n".join(lines)


def as_markdown(results: Mapping[int, Result]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| # | fault | what happens | lost | recovery | tests |", "|---|---|---|---|---|---|"]
    for fault in FAULTS:
        last = results.get(fault.number)
        shown = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in fault.tests) or fault.why_not
        if fault.command:
            shown += f"<br>`{fault.command}`"
        recovery = f"{fault.recovery}{_measured(last)}"
        cells = (str(fault.number), fault.title, fault.required, fault.lost, recovery, shown)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _measured(last: Result | None) -> str:
    """How long it took, to two digits, until what, and by whose clock when not by the wall's."""
    if last is None or last.recovery_s is None:
        return ""
    seconds = last.recovery_s
    took = f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1e3:.2g} ms"
    until = f" until {last.recovery_until}" if last.recovery_until else ""
    return f" (measured: {took}{until}{'' if last.recovery_clock == 'wall' else ', injected clock'})"
