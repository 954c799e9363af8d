"""The parts of the page that only runs with a value function have: its numbers, and what came before the fleet."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from sop.report.words import minutes, percent, percent_range

_BEFORE = (
    "Base rollouts are attempts of the base policy alone, recorded before the fleet started: the value function learns "
    "from them what failing looks like. They count neither as episodes of the fleet nor as anybody's time. The shares "
    "are steps of the policy whose advantage is above the task's threshold: offline in the base rollouts, online in "
    "the fleet's episodes, as the learner last had them."
)


def value_table(value: Mapping[str, Any] | None) -> str:
    """HTML: the block `value` of a summary per task and in all, and the drift in a sentence; empty without one."""
    if value is None:
        return ""
    head = ("task", "rank corr.", "calib. error", "in steps", "told apart", "episodes")
    rows = [(escape(task), *_value_cells(numbers)) for task, numbers in value["per_task"].items()]
    drift = value["drift"]
    parts = ((name, drift[f"{name}_quarter"]) for name in ("first", "last"))
    then = "; ".join(
        f"{name} quarter of the episodes: rank correlation {_two(part['rank_correlation'])}, "
        f"predicted minus realised {_two(part['bias'], sign=True)}"
        for name, part in parts
    )
    return (
        _table(head, [*rows, ("all tasks", *_value_cells(value))])
        + '<p class="quiet">In steps: mean distance of prediction and return, a failure counts as the steps that it '
        "costs. Told apart: the chance that a success is valued above a failure of the same task, at the "
        f"start, in the middle and at the end of an episode; 50 % is guessing. {escape(then.capitalize())}.</p>"
    )


def _value_cells(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    steps = numbers["mean_absolute_error_steps"]
    return (
        _two(numbers["rank_correlation"]),
        _two(numbers["calibration_error"]),
        "-" if steps is None else f"{steps:.0f}",
        ", ".join(percent(numbers[f"auc_{moment}"]) for moment in ("start", "middle", "end")),
        str(numbers["num_episodes"]),
    )


def before_fleet_section(recap: Mapping[str, Any] | None) -> str:
    """HTML: the block `recap` of a summary as a section; empty without base rollouts."""
    if recap is None or not recap["base_rollouts"]["episodes"]:
        return ""
    rollouts, warmup, wall = (recap[name] for name in ("base_rollouts", "warmup", "wall_minutes"))
    head = ("task", "base rollouts", "successful", "positive offline", "positive online")
    rows = [
        (
            escape(task),
            str(mine["episodes"]),
            f"{percent(mine['success'])} <small>{percent_range(mine['interval'])}</small>",
            percent(recap["per_task"][task]["offline_positive_share"]),
            percent(recap["per_task"][task]["positive_share"]),
        )
        for task, mine in rollouts["per_task"].items()
    ]
    facts = [f"{phase} took {minutes(value)}" for phase, value in wall.items()]
    if warmup["separation"] is not None:
        facts.append(
            f"after the warm-up the two branches of the policy differ by {warmup['separation']:.3f} of its squared "
            f"velocity, and the loss without an indicator is {_three(warmup['null_loss'])} "
            f"({_three(warmup['base_loss'])} for the base)"
        )
    found = "; ".join(facts)
    note = f'<p class="quiet">{escape(found[0].upper() + found[1:])}.</p>' if found else ""
    return f'<h2>Before the fleet</h2>\n<p class="quiet">{escape(_BEFORE)}</p>\n{_table(head, rows)}{note}'


def _two(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.2f}"


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML; the caller escapes what comes from outside."""
    cells = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'
