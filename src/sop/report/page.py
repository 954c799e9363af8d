"""The report as one HTML file that needs nothing but itself: text, tables, pictures as base64."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sop.report import figures
from sop.report.advantage_page import before_fleet_section, value_table
from sop.report.curve import curve
from sop.report.filmstrip import Strip, choose, film_strip
from sop.report.hops import freshness_section
from sop.report.record import RunRecord, read_run
from sop.report.summary import write_summary
from sop.report.value import valued_episodes
from sop.report.value_figure import VALUE_READING, value_picture
from sop.report.words import describe, minutes, percent, percent_range, points, seconds

PAGE, CURVE, VALUE = "report.html", "curve.png", "value.png"

_CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #66727f; --line: #e3e7ec; --soft: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem; }
p { margin: .4rem 0; }
.quiet { color: var(--muted); font-size: .92rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.tile { background: var(--soft); border-radius: .6rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; }
.tile span { color: var(--muted); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin: .6rem 0; }
th, td { padding: .4rem 0 .4rem .9rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
table.facts td:first-child { white-space: normal; }
.tile b { white-space: nowrap; }
th { font-weight: 600; color: var(--muted); }
tr.total td { font-weight: 700; border-top: 2px solid var(--ink); }
td small { color: var(--muted); font-weight: 400; }
img { width: 100%; height: auto; display: block; margin: .6rem 0; }
"""


@dataclass(frozen=True, slots=True)
class _Section:
    title: str
    reading: str
    """One sentence: how to read the picture."""
    picture: bytes | None
    table: str = ""
    """HTML below the picture."""


def write_report(run_dir: Path) -> Path:
    """Write `summary.json`, `curve.png`, `value.png` and `report.html` into the run's folder; returns the page. Blocks.

    Works for a run that was stopped at any moment; a picture without data is left out. May be repeated.

    Raises:
        RunError: there is no such folder.
    """
    record = read_run(run_dir)
    summary = write_summary(record)
    pictures = {CURVE: curve(record), VALUE: value_picture(valued_episodes(record))}
    for name, picture in pictures.items():
        if picture is not None:
            (run_dir / name).write_bytes(picture)
    value = _Section("Value function", VALUE_READING, pictures[VALUE], value_table(summary["value"]))
    page = run_dir / PAGE
    part = page.with_name(f"{PAGE}.part")
    part.write_text(_page(summary, _sections(record, pictures[CURVE], value)), encoding="utf-8")
    part.replace(page)
    return page


def _sections(record: RunRecord, learning_curve: bytes | None, value: _Section) -> list[_Section]:
    strip = choose(record.episodes)
    sections = [
        _Section(
            "Success",
            "Every dot is an evaluation without operators on fixed scenes: large ones are the base and the final "
            "policy; small ones, joined by the lines, are versions judged while the fleet ran, with fewer attempts on "
            "other scenes: compare large with large and small with small. Bars and the grey band are 95 % intervals, "
            "the dashed line is the scripted expert.",
            learning_curve,
        ),
        _Section(
            "Corrections",
            "When the policy gets better, people step in less often and for a shorter time: both fall to the right.",
            figures.corrections(record),
        ),
        _Section("One correction", _strip_reading(strip), None if strip is None else film_strip(record, strip)),
        value,
        _Section(
            "What the learner drew",
            "Above the dotted line more than half of a task's training data came from the fleet, below it from the "
            "static demonstrations; the sampler leans towards the side with the higher loss.",
            figures.shares(record),
        ),
        _Section(
            "Staleness and weights on the way",
            "Staleness counts the versions that were published since the one that recorded an episode; in the lower "
            "picture a curve further left means that new policies reach the robots sooner.",
            figures.staleness(record),
        ),
        _Section(
            "Episodes on the way",
            "The curve tells which share of the episodes the learner could draw within so many seconds of their end.",
            figures.freshness(record),
        ),
        _Section(
            "Training",
            "The loss is that of the mixture the sampler draws, so it may rise when harder data arrives; the lower "
            "picture should stay close to 100 %.",
            figures.training(record),
        ),
    ]
    return [section for section in sections if section.picture is not None]


def _strip_reading(strip: Strip | None) -> str:
    if strip is None:
        return ""
    episode, mark = strip.episode, strip.correction
    return (
        f"Task {episode.task}, policy version {episode.policy_version}: the frame's colour says who was in control, "
        f"the policy (blue) or the operator (orange), who took over at step {mark.start} of {episode.num_steps} "
        f"because of {mark.reason!r} and kept control until step {mark.stop}."
    )


def _page(summary: Mapping[str, Any], sections: Iterable[_Section]) -> str:
    name = escape(summary["name"] or "run")
    about = [f"{label} {summary[key]}" for key, label in _ABOUT if summary[key] is not None]
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="quiet">{escape(", ".join(about))}</p>',
        f"<p>{escape(describe(summary)).replace(' %', '&nbsp;%')}</p>",
        _tiles(summary),
        _task_table(summary),
        _held_out_table(summary),
        *(_section(section) for section in sections),
        before_fleet_section(summary["recap"]),
        freshness_section(summary["freshness"]),
        _accounting(summary),
        _setup(summary),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{name}</title>\n<link rel="icon" href="data:,">\n<style>{_CSS}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


_ABOUT = (("preset", "preset"), ("algorithm", "algorithm"), ("seed", "seed"))


def _tiles(summary: Mapping[str, Any]) -> str:
    gain, freshness = summary["gain"], summary["freshness"]
    success, judged = percent(summary["base"]["success"]), "success of the base policy"
    if summary["final"]["success"] is not None:
        success, judged = f"{success} &rarr; {percent(summary['final']['success'])}", "success, base and final policy"
    gained = "-" if gain["difference"] is None else f"{points(gain['difference'])} points"
    around = "" if gain["interval"] is None else f" ({points(gain['interval'][0])} to {points(gain['interval'][1])})"
    swap, sampleable = (freshness[name]["p50"] for name in ("publish_to_swap_s", "episode_to_sampleable_s"))
    tiles = [
        (success, judged),
        (gained, f"gain{around}"),
        (str(summary["episodes"]), "episodes of the fleet"),
        (str(summary["interventions"]), f"interventions, {minutes(summary['operator_minutes'])} of an operator"),
        (seconds(sampleable), "from an episode's end to the learner, median"),
        (seconds(swap), "from publishing to acting, median"),
    ]
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{escape(label)}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{cells}</div>'


def _rate(rate: float | None, interval: Sequence[float] | None) -> str:
    if rate is None:
        return "-"
    return f"{percent(rate)} <small>{percent_range(interval)}</small>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, total: Sequence[str] | None = None) -> str:
    """Cells are HTML; the caller escapes what comes from outside."""
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>", *map(_row, rows)]
    if total is not None:
        lines.append(_row(total).replace("<tr>", '<tr class="total">', 1))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _facts(rows: Iterable[Sequence[str]]) -> str:
    """A table of names and values without a head."""
    return f'<table class="facts">{"".join(map(_row, rows))}</table>'


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _task_table(summary: Mapping[str, Any]) -> str:
    if not summary["per_task"]:
        return ""
    rows = [
        (
            escape(task),
            _rate(row["base"], row["base_interval"]),
            _rate(row["final"], row["interval"]),
            percent(row["expert"]),
            str(row["episodes"]),
            str(row["interventions"]),
        )
        for task, row in summary["per_task"].items()
    ]
    base, final, expert = (summary[name] for name in ("base", "final", "expert"))
    total = (
        "all tasks",
        _rate(base["success"], base["interval"]),
        _rate(final["success"], final["interval"]),
        percent(expert["success"]),
        str(summary["episodes"]),
        str(summary["interventions"]),
    )
    head = ("task", "base", "final", "expert", "episodes", "interventions")
    return "<h2>Tasks of the fleet</h2>" + _table(head, rows, total=total)


def _held_out_table(summary: Mapping[str, Any]) -> str:
    tasks = summary["held_out"]["per_task"]
    if not tasks:
        return ""
    rows = [
        (escape(task), _rate(row["base"], row["base_interval"]), _rate(row["final"], row["final_interval"]),
         percent(row["expert"]))
        for task, row in tasks.items()
    ]  # fmt: skip
    return (
        "<h2>Tasks that the fleet did not work on</h2>"
        "<p>They are in the static demonstrations only: a fall here means that the policy forgets.</p>"
        + _table(("task", "base", "final", "expert"), rows)
    )


def _section(section: _Section) -> str:
    data = base64.b64encode(section.picture or b"").decode()
    title = escape(section.title)
    return (
        f'<h2>{title}</h2>\n<p class="quiet">{escape(section.reading)}</p>\n'
        f'<img alt="{title}" src="data:image/png;base64,{data}">{section.table}'
    )


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    return f"{text} {unit}".strip()


def _accounting(summary: Mapping[str, Any]) -> str:
    freshness = summary["freshness"]
    names = {
        "episode_to_sampleable_s": "from an episode's end to the learner's index",
        "publish_to_staged_s": "from publishing to ready on a robot",
        "publish_to_swap_s": "from publishing to acting",
    }
    rows = [
        ("episodes recorded by the actors", _number(summary["recorded_episodes"])),
        ("episodes indexed by the learner", _number(summary["indexed_episodes"])),
        ("waiting in a spool or in the store", _number(summary["waiting_episodes"])),
        ("lost", _number(summary["lost_episodes"])),
        ("indexed twice", _number(summary["duplicate_episodes"])),
        ("refused (quarantined)", _number(summary["quarantined"])),
        ("aborted", _number(summary["aborted_episodes"])),
        ("robot time, resets included", minutes(summary["robot_minutes"])),
        ("successes per robot-hour, base", _number(summary["throughput"]["base"])),
        ("successes per robot-hour, final", _number(summary["throughput"]["final"])),
        ("learner steps", _number(summary["learner_steps"])),
        ("policies published", _number(summary["publishes"])),
        ("learner busy", percent(summary["learner_busy"])),
        *(
            (f"{label}, median / 99 %", f"{seconds(freshness[key]['p50'])} / {seconds(freshness[key]['p99'])}")
            for key, label in names.items()
        ),
        (
            "staleness, median / 99 %",
            f"{_number(summary['staleness']['p50'])} / {_number(summary['staleness']['p99'])}",
        ),
    ]
    definition = escape(summary["definitions"]["lost_episodes"])
    return f'<h2>Accounts</h2>{_facts(rows)}<p class="quiet">{definition}.</p>'


def _setup(summary: Mapping[str, Any]) -> str:
    rows = [(escape(f"wall-clock: {phase}"), minutes(value)) for phase, value in summary["wall"].items()]
    rows.append(("wall-clock: total", minutes(summary["wall_minutes"])))
    hardware = summary["hardware"]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    gain = f"Gain: {summary['definitions']['gain']}. Intervals of rates: Wilson, 95 %."
    return (
        f"<h2>How it was run</h2>{_table(('', ''), rows)}"
        f'<p class="quiet">{escape(machine)}. {escape(versions)}. {escape(gain)}</p>'
    )
