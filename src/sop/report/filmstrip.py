"""One corrected episode as a film strip: what the cameras saw, who was in control, and why that changed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sop.core.codec import EncodedEpisode
from sop.core.episode import Controller, Intervention, Outcome, human_runs
from sop.report.record import EpisodeFacts, RunRecord
from sop.report.style import HUMAN, MUTED, POLICY, WIDTH_IN, render

FRAMES = 10
_COLUMNS = 5
_COLORS = {Controller.POLICY: POLICY, Controller.HUMAN: HUMAN}


@dataclass(frozen=True, slots=True)
class Strip:
    """The episode that is shown, and the correction in it that is marked."""

    episode: EpisodeFacts
    correction: Intervention


def choose(episodes: Iterable[EpisodeFacts]) -> Strip | None:
    """A successful episode in which the policy drove before and, if there is one, after a correction.

    Of several: fewest corrections, then the correction closest to the middle, then the latest episode.
    """
    best: tuple[tuple[float, ...], Strip] | None = None
    for episode in episodes:
        if episode.outcome is not Outcome.SUCCESS:
            continue
        for mark in episode.interventions:
            if mark.start == 0:
                continue
            off_centre = abs((mark.start + mark.stop) / 2 / episode.num_steps - 0.5)
            score = (mark.stop == episode.num_steps, len(episode.interventions), off_centre, -episode.end_utc_ns)
            if best is None or score < best[0]:
                best = (score, Strip(episode, mark))
    return None if best is None else best[1]


def frames_to_show(num_steps: int, mark: Intervention, count: int = FRAMES) -> list[int]:
    """Steps to show, ascending: first, takeover, hand-back and last; the others halve the widest gaps."""
    chosen = sorted({0, mark.start, min(mark.stop, num_steps - 1), num_steps - 1})
    while len(chosen) < min(count, num_steps):
        gaps = np.diff(chosen)
        widest = int(np.argmax(gaps))
        chosen.insert(widest + 1, chosen[widest] + int(gaps[widest]) // 2)
    return chosen


def film_strip(record: RunRecord, strip: Strip) -> bytes | None:
    """The picture as PNG; None when the run's identity or the episode is gone. Decodes the frames that are shown."""
    if record.store is None or record.run is None:
        return None
    episode = EncodedEpisode(record.store.get(strip.episode.key), trusted=False)
    steps = frames_to_show(episode.num_steps, strip.correction)
    hz = record.run.embodiment.control_hz
    bands = -(-len(steps) // _COLUMNS)
    cameras = episode.cameras
    side = WIDTH_IN / _COLUMNS

    def paint(figure: Figure) -> None:
        ratios = ([side] * len(cameras) + [0.42]) * bands + [0.26]
        grid = figure.add_gridspec(len(ratios), _COLUMNS, height_ratios=ratios, hspace=0.02, wspace=0.02)
        for number, step in enumerate(steps):
            row = number // _COLUMNS * (len(cameras) + 1)
            who = Controller(int(episode.controller[step]))
            for offset, camera in enumerate(cameras):
                axes = figure.add_subplot(grid[row + offset, number % _COLUMNS])
                axes.imshow(episode.frame(camera, step), interpolation="bicubic")
                _frame_border(axes, _COLORS[who])
                if not number % _COLUMNS:
                    axes.set_ylabel(camera, fontsize=9.5, color=MUTED)
            label = figure.add_subplot(grid[row + len(cameras), number % _COLUMNS])
            label.axis("off")
            note = _note(step, strip.correction, episode.num_steps, strip.episode.outcome)
            label.text(0.5, 1.0, f"{step / hz:.1f} s\n{note}", color=_COLORS[who] if note else MUTED, ha="center",
                       va="top", fontsize=10, fontweight="bold" if note else "normal")  # fmt: skip
        _paint_timeline(figure.add_subplot(grid[-1, :]), episode, strip.correction, hz)

    return render(sum([side] * len(cameras) + [0.42]) * bands + 1.1, paint)


def _frame_border(axes: Any, color: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=3)


def _note(step: int, mark: Intervention, num_steps: int, outcome: Outcome) -> str:
    if step == mark.start:
        return "takes over"
    if step == mark.stop:
        return "hands back"
    return outcome.value if step == num_steps - 1 else ""


def _paint_timeline(axes: Any, episode: EncodedEpisode, mark: Intervention, hz: float) -> None:
    """A bar from start to end in the colours of who was in control."""
    axes.barh(0, episode.num_steps / hz, height=1, color=POLICY)
    for start, stop in human_runs(episode.controller):
        axes.barh(0, (stop - start) / hz, left=start / hz, height=1, color=HUMAN)
    axes.set_xlim(0, episode.num_steps / hz)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("seconds since the start of the episode")
    legend = [Patch(color=POLICY, label="policy"), Patch(color=HUMAN, label=f"{mark.operator}: {mark.reason}")]
    axes.figure.legend(handles=legend, loc="outside lower left", ncols=2)
