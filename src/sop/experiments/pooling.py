"""Results of all arms and seeds, pooled: what `summary.json` says of every arm.

Success is pooled over seeds (Wilson's interval of all episodes together), with the mean over seeds and its standard
error beside it; the episodes of a seed share one base policy and one stream, so the second says more about another
seed, and the first about another episode. Arms are compared over the seeds that both have. Look-aheads of several
policies begin at the same moments, so their intervals take scenes as the units. Intervals cover 95 %.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sop.core.evaluation import wilson_interval
from sop.report.summary import newcombe_interval

Counts = Mapping[str, Sequence[int]]
Result = Mapping[str, Any]
DIP_PUBLISHES = (1, 2, 3, 4)
"""Publishes right after the start, in which a dip would be."""


def total(counts: Counts) -> tuple[int, int]:
    """Successes and episodes of all tasks together."""
    return sum(pair[0] for pair in counts.values()), sum(pair[1] for pair in counts.values())


def pooled(counts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A success rate over seeds from (successes, episodes) of each; None for what cannot be known."""
    successes, episodes = total(counts)
    low, high = wilson_interval(successes, episodes)
    rates = [won / tried for won, tried in counts.values() if tried]
    return {
        "counts": {seed: list(pair) for seed, pair in counts.items()},
        "successes": successes,
        "episodes": episodes,
        "rate": successes / episodes if episodes else None,
        "low": low,
        "high": high,
        "per_seed": rates,
        **mean_and_error(rates),
    }


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """`mean` over seeds and its standard error `se` (None with fewer than two)."""
    if not values:
        return {"mean": None, "se": None}
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "se": None}
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"mean": mean, "se": math.sqrt(variance / len(values))}


def pool_arm(results: Sequence[Result]) -> dict[str, Any]:
    """One arm's results of all seeds."""
    final = [result["final"] for result in results]
    seeds = [result["seed"] for result in results]

    def over_seeds(counts: Sequence[Sequence[int]]) -> dict[str, Any]:
        return pooled(dict(zip(seeds, counts, strict=True)))

    conditions = [name for name in final[0]["conditions"] if all(name in one["conditions"] for one in final)]
    own = final[0]["own"]
    found: dict[str, Any] = {
        "settings": results[-1]["settings"],
        "seeds": seeds,
        "own_condition": own,
        "success": over_seeds([total(one["conditions"][own]) for one in final]),
        "success_per_task": {
            task: over_seeds([one["conditions"][own][task] for one in final]) for task in final[0]["conditions"][own]
        },
        "conditions": {name: over_seeds([total(one["conditions"][name]) for one in final]) for name in conditions},
        "held_out": over_seeds([total(one["held_out"]) for one in final]),
        "curve": _curve(results),
        "dip": _dip(results),
        "warmup_steps": [result["warmup_steps"] for result in results],
        "steps": [result["steps"] for result in results],
        "wall_s": [result["wall_s"] for result in results],
    }
    if all("base" in one for one in final):
        found["base"] = over_seeds([total(one["base"]["conditions"][own]) for one in final])
        found["base_held_out"] = over_seeds([total(one["base"]["held_out"]) for one in final])
    if "negative" in conditions:
        found["negative_minus_own"] = _difference(found["success"], found["conditions"]["negative"])
    if all("signed" in one for one in final):
        found["signed_advantage"] = _signed([one["signed"] for one in final])
        found["signed_advantage"]["lookahead_steps"] = final[0]["signed"]["lookahead_steps"]
    return found


def compare(arms: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What needs several arms: the base policy's success, every arm's gain over it, and time to target.

    The target is the base's success plus half of the best arm's gain; time to it is the first evaluated publish from
    which success stays there. Adds `gain` and `time_to_target` to the arms. Without the arm that begins with the
    base policy as it was made, the first arm's publish 0 takes its place.
    """
    first = arms[next(iter(arms))]["curve"][0]["success"]
    base = next((arm["base"] for arm in arms.values() if "base" in arm), first)
    for arm in arms.values():
        arm["gain"] = _difference(base, arm["success"])
    gains = {name: arm["gain"]["difference"] for name, arm in arms.items()}
    best = max(gains, key=lambda name: -math.inf if gains[name] is None else gains[name])
    gain = gains[best] or 0.0
    target = base["rate"] + gain / 2
    for arm in arms.values():
        arm["time_to_target"] = time_to_target(arm["curve"], target) if gain > 0 else None
    return {"base": base, "best_arm": best, "target": target if gain > 0 else None}


def time_to_target(curve: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any] | None:
    """The first point of a curve from which success never falls below the target again; None when there is none."""
    reached = None
    for point in reversed(curve):
        if point["success"]["rate"] < target:
            break
        reached = point
    if reached is None:
        return None
    return {name: reached[name] for name in ("publish", "learner_step", "online_episodes")}


def _curve(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Points that all seeds have: by number of the publish, the last ones together."""
    seeds = [one["seed"] for one in results]
    series = [{("last" if point["last"] else point["publish"]): point for point in one["curve"]} for one in results]
    found = []
    for name in series[0]:
        if not all(name in points for points in series):
            continue
        points = [points[name] for points in series]
        pooled_point: dict[str, Any] = {
            "publish": round(sum(point["publish"] for point in points) / len(points), 2),
            "learner_step": round(sum(point["learner_step"] for point in points) / len(points), 1),
            "online_episodes": round(sum(point["online_episodes"] for point in points) / len(points), 1),
            "last": name == "last",
            "success": pooled(dict(zip(seeds, [total(point["success"]) for point in points], strict=True))),
        }
        for measure in ("separation", "separation_negative", "told_apart", "noise"):
            if all(measure in point for point in points):
                values = [point[measure] for point in points]
                pooled_point[measure] = {**mean_and_error(values), "per_seed": values}
        found.append(pooled_point)
    return found


def _dip(results: Sequence[Result]) -> dict[str, Any] | None:
    """The lowest success among the first publishes minus that of publish 0.

    The lowest of several is low by chance too: its interval is that of a single comparison.
    """
    curve = _curve(results)
    early = [point for point in curve if point["publish"] in DIP_PUBLISHES]
    if not early:
        return None
    lowest = min(early, key=lambda point: point["success"]["rate"])
    return {"publish": lowest["publish"], **_difference(curve[0]["success"], lowest["success"])}


def _difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Second minus first rate over the seeds that both have, Newcombe's interval; and the mean over these seeds of the
    differences. None where no seed has both."""
    tried = [{seed: pair for seed, pair in rate["counts"].items() if pair[1]} for rate in (first, second)]
    seeds = [seed for seed in tried[0] if seed in tried[1]]
    one, two = (pooled({seed: counts[seed] for seed in seeds}) for counts in tried)
    per_seed = [after - before for before, after in zip(one["per_seed"], two["per_seed"], strict=True)]
    low, high = (
        newcombe_interval((one["successes"], one["episodes"]), (two["successes"], two["episodes"]))
        if seeds
        else (None, None)
    )
    return {
        "seeds": seeds,
        "difference": two["rate"] - one["rate"] if seeds else None,
        "low": low,
        "high": high,
        "per_seed": per_seed,
        **mean_and_error(per_seed),
    }


def _signed(per_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of all pairs with its interval, the share of pairs above 0, and the mean of every seed.

    Pairs of the same scene depend on one another, be they of another moment or another policy: the standard error is
    the cluster-robust one with a scene (`task`, `seed`) as the cluster (Liang and Zeger 1986), the quantile Student's
    with one degree of freedom less than there are scenes.
    """
    everything = [value for one in per_seed for value in one["difference"]]
    scenes: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for one in per_seed:
        for task, seed, value in zip(one["task"], one["seed"], one["difference"], strict=True):
            scenes[task, seed].append(value)
    mean = mean_and_error(everything)["mean"]
    half = None
    if mean is not None and len(scenes) > 1:
        spread = math.fsum(math.fsum(value - mean for value in values) ** 2 for values in scenes.values())
        error = math.sqrt(spread * len(scenes) / (len(scenes) - 1)) / len(everything)
        half = _student(len(scenes) - 1) * error
    return {
        "pairs": len(everything),
        "scenes": len(scenes),
        "mean": mean,
        "low": None if mean is None or half is None else mean - half,
        "high": None if mean is None or half is None else mean + half,
        "share_positive": sum(value > 0 for value in everything) / len(everything) if everything else None,
        "per_seed": [mean_and_error(one["difference"])["mean"] for one in per_seed],
    }


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t, by the Cornish-Fisher expansion about the normal one; within 1 % from 5 degrees
    of freedom on (Abramowitz and Stegun 26.7.5)."""
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
