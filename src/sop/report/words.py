"""The run in one paragraph of plain words. What is not known is left out; a bad result is said as it is."""

from collections.abc import Mapping, Sequence
from typing import Any


def percent(value: float | None) -> str:
    """`93 %`, or `-` when not known."""
    return "-" if value is None else f"{100 * value:.0f} %"


def percent_range(interval: Sequence[float] | None) -> str:
    """`89-96 %`, or `-` when not known."""
    return "-" if interval is None else f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f} %"


def points(value: float) -> str:
    """A difference of two rates in percentage points, with its sign."""
    return f"{100 * value:+.0f}"


def seconds(value: float | None) -> str:
    """`0.8 s`, `12 s` or `3.4 min`; `-` when not known."""
    if value is None:
        return "-"
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{value:.2f} s" if value < 0.995 else f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"


def minutes(value: float | None) -> str:
    """`12 s` or `3.4 min`; `-` when not known."""
    if value is None:
        return "-"
    return f"{value:.1f} min" if value >= 1 else f"{60 * value:.0f} s"


def count(number: int, noun: str) -> str:
    """`1 episode`, `2 episodes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe(summary: Mapping[str, Any]) -> str:
    """One paragraph with the numbers that matter, for a terminal or the top of a page."""
    parts = (_collected, _algorithm, _success, _held_out, _value, _loop, _safety)
    sentences = [part(summary) for part in parts]
    return " ".join(sentence for sentence in sentences if sentence)


def _collected(summary: Mapping[str, Any]) -> str:
    start = "The run was interrupted. " if summary["interrupted"] else ""
    if not summary["episodes"]:
        return f"{start}The fleet collected no episodes."
    taught = summary["demonstrated_episodes"] == summary["episodes"]
    what = count(summary["episodes"], "demonstration" if taught else "episode")
    text = f"{start}{'Operators recorded' if taught else 'The fleet collected'} {what}"
    if summary["robot_minutes"] is not None:
        text += f" in {minutes(summary['robot_minutes'])} of robot time"
    if taught or summary["operators"] is False:
        return text + "."
    text += f", with {count(summary['interventions'], 'intervention')}"
    if summary["operator_minutes"] is not None:
        text += f" and {minutes(summary['operator_minutes'])} of an operator's time"
    return text + "."


def _algorithm(summary: Mapping[str, Any]) -> str:
    if summary["algorithm"] is None:
        return ""
    text = f"The algorithm was {summary['algorithm']}"
    if summary["operators"] is False:
        text += "; nobody helped"
    elif summary["operators"]:
        text += "; operators helped" if summary["interventions"] else "; operators were there"
    if summary["exploration"]:
        text += ", with exploration on"
    return text + "."


def _value(summary: Mapping[str, Any]) -> str:
    value = summary["value"]
    if value is None or value["rank_correlation"] is None:
        return ""
    return (
        f"The value function, asked about {count(value['num_episodes'], 'episode')} of the fleet that it had not seen, "
        f"agrees with what came of them at a rank correlation of {value['rank_correlation']:.2f} (calibration error "
        f"{value['calibration_error']:.2f} on a scale of 1)."
    )


def _success(summary: Mapping[str, Any]) -> str:
    base, final, gain = summary["base"], summary["final"], summary["gain"]
    if base["success"] is None and final["success"] is None:
        return "No policy was evaluated."
    if final["success"] is None:
        return f"The base policy succeeds in {_rate(base)}; there is no final evaluation."
    if base["success"] is None:
        return f"The final policy succeeds in {_rate(final)}; there is no evaluation of the base to compare with."
    low, high = gain["interval"]
    text = f"Success over {count(len(summary['per_task']), 'task')} went from {_rate(base)} to {_rate(final)}: "
    text += f"{points(gain['difference'])} points (95 % interval {points(low)} to {points(high)})."
    if high < 0:
        text += " The policy got worse."
    elif low <= 0:
        text += " The interval includes zero, so this run does not show a difference."
    worse = [task for task, row in summary["per_task"].items() if _fell(row)]
    if worse:
        text += f" Worse than the base on: {', '.join(worse)}."
    if summary["expert"]["success"] is not None:
        text += f" The scripted expert, the ceiling, reaches {percent(summary['expert']['success'])}."
    return text


def _fell(row: Mapping[str, Any]) -> bool:
    return row["base"] is not None and row["final"] is not None and row["final"] < row["base"]


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{percent(rate['success'])} of {rate['episodes']} attempts ({percent_range(rate['interval'])})"


def _held_out(summary: Mapping[str, Any]) -> str:
    base, final = summary["held_out"]["base"], summary["held_out"]["final"]
    if base is None or final is None:
        return ""
    return f"Tasks that the fleet did not work on went from {percent(base)} to {percent(final)}."


def _loop(summary: Mapping[str, Any]) -> str:
    freshness = summary["freshness"]
    ways = {
        "a published policy acted": freshness["publish_to_swap_s"],
        "an episode could be learned from": freshness["episode_to_sampleable_s"],
    }
    parts = [
        f"{what} after {seconds(time['p50'])} (99 % within {seconds(time['p99'])})"
        for what, time in ways.items()
        if time["p50"] is not None
    ]
    if not parts:
        return ""
    policies = "1 policy" if summary["publishes"] == 1 else f"{summary['publishes']} policies"
    return f"The learner published {policies}; at the median, {' and '.join(parts)}."


def _safety(summary: Mapping[str, Any]) -> str:
    recorded, lost, doubled = (summary[f"{name}_episodes"] for name in ("recorded", "lost", "duplicate"))
    text = ""
    if recorded:
        text = f"Of {count(recorded, 'recorded episode')} {lost} {'was' if lost == 1 else 'were'} lost"
        if doubled is not None:
            text += f", {doubled} indexed twice"
        text += f" and {summary['quarantined']} refused."
    if summary["wall_minutes"] is not None:
        text += f" Everything took {minutes(summary['wall_minutes'])}."
    return text.strip()
