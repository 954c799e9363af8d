"""The page and its pictures: what they show, that they need nothing else, and that they cope with half a run."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from run_directory import START_UTC_S, RunDirectory, make_episode
from sop.core.episode import Intervention, Outcome
from sop.report import figures, summarise, write_report
from sop.report.curve import FleetTime, curve
from sop.report.filmstrip import choose, film_strip, frames_to_show
from sop.report.record import EpisodeFacts, read_run
from sop.report.style import HUMAN, POLICY

PNG = b"\x89PNG\r\n"
TITLES = (
    "Success",
    "Corrections",
    "One correction",
    "What the learner drew",
    "Staleness and weights on the way",
    "Episodes on the way",
    "Training",
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with something for every picture."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "whole", fleet_tasks=("open", "a<b>$x$"))
    run.write_run()
    keys = []
    for number in range(8):
        controllers = "P" * 10 + "H" * (8 - number) + "P" * 12
        start_s = 10.0 * number
        keys.append(run.record(make_episode(controllers, sequence=number, start_s=start_s, version=number)))
        values = {"episode/sampleable_s": 0.2 + 0.1 * number, "episode/staleness": float(number % 3)}
        run.log("learner", start_s + 2, 5 * number, values)
    for step in range(5, 40, 5):
        values = {"learner/busy": 0.9, "learner/worked_s": 1.0, "learner/version": step // 5, "learner/loss": 1 / step}
        run.log("learner", step * 2.0, step, values | {"sampler/online_share/open": 0.6})
        run.log("fleet", step * 2.0, step, {"fleet/publish_to_swap_s": step / 9, "fleet/publish_to_staged_s": 0.2})
    run.checkpoint(35, keys)
    run.publish(*range(8))
    counts = {"open": (5, 10), "a<b>$x$": (2, 10), "slide": (8, 10)}
    run.evaluate("base", 0, counts, at_s=-30)
    run.evaluate("expert", None, counts | {"open": (10, 10)})
    run.evaluate("progress", 4, {"open": (3, 4), "a<b>$x$": (2, 4)}, at_s=40)
    run.evaluate("final", 7, counts | {"open": (9, 10), "a<b>$x$": (8, 10)}, at_s=80)
    run.write_timing({"fleet": 90.0})
    return run


@pytest.fixture(scope="module")
def page(whole_run: RunDirectory) -> str:
    """The page of the whole run."""
    return write_report(whole_run.folder).read_text()


def test_the_page_has_every_section_and_the_key_numbers(whole_run: RunDirectory, page: str) -> None:
    text = page.replace("&nbsp;", " ")
    assert text == (whole_run.folder / "report.html").read_text().replace("&nbsp;", " ")
    assert [title for title in TITLES if f"<h2>{title}</h2>" not in text] == []
    assert "35 % &rarr; 85 %" in text
    assert "+50 points" in text
    assert "90 % <small>60-98 %</small>" in text
    assert "<td>lost</td><td>0</td>" in text
    assert '<div class="tile"><b>8</b><span>episodes of the fleet</span></div>' in text
    assert "took over at step 10 of" in text
    assert (whole_run.folder / "curve.png").read_bytes().startswith(PNG)
    assert (whole_run.folder / "summary.json").exists()


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    references = re.findall(r'(?:src|href|srcset|action)\s*=\s*"([^"]*)"', page)
    assert len(references) == len(TITLES) + 1
    assert [reference for reference in references if not reference.startswith("data:")] == []
    assert re.search(r"https?://|@import|url\(|<script|<link rel=\"stylesheet", page) is None


def test_names_from_outside_are_escaped(page: str) -> None:
    assert "a&lt;b&gt;$x$" in page
    assert "a<b>" not in page


def test_the_report_can_be_written_again(whole_run: RunDirectory, page: str) -> None:
    assert write_report(whole_run.folder).read_text() == page


def test_half_a_run_gets_a_page_with_what_there_is(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "half")
    run.write_run()
    run.evaluate("base", 0, {"open": (5, 10), "close": (2, 10), "slide": (8, 10)}, at_s=-30)
    run.record(make_episode("PPPP"))
    text = write_report(run.folder).read_text()
    assert "<h2>Success</h2>" in text
    assert "<h2>Training</h2>" not in text
    assert "<h2>One correction</h2>" not in text
    assert "there is no final evaluation" in text


def test_an_empty_folder_gets_a_page_without_pictures(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text()
    assert "<img" not in text
    assert "No policy was evaluated." in text
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    "picture", [figures.corrections, figures.shares, figures.staleness, figures.freshness, figures.training, curve]
)
def test_a_picture_is_drawn_when_there_is_data_and_left_out_otherwise(
    picture: figures.Picture, whole_run: RunDirectory, tmp_path: Path
) -> None:
    drawn = picture(read_run(whole_run.folder))
    assert drawn is not None
    assert drawn.startswith(PNG)
    (tmp_path / "empty").mkdir()
    assert picture(read_run(tmp_path / "empty")) is None


def test_a_rolling_mean_is_weighted_and_short_at_the_beginning() -> None:
    assert figures.rolling([1, 0, 3, 0], [1, 1, 2, 2], 2).tolist() == [1.0, 0.5, 1.0, 0.75]


def test_fleet_time_leaves_out_the_time_in_which_the_run_was_stopped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_run()
    for number, start_s in enumerate((0, 60, 3600)):
        run.record(make_episode("P" * 20, sequence=number, start_s=start_s))
    time = FleetTime(read_run(run.folder))
    assert time.at(START_UTC_S - 500) == 0.0
    assert time.at(START_UTC_S + 61) == pytest.approx(61)
    assert time.at(START_UTC_S + 3600) == pytest.approx(61)
    assert time.episode_ends() == pytest.approx([1, 61, 62])


def test_fleet_time_counts_from_the_learners_first_lap_when_there_is_no_fleet(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for at_s, version in ((0.0, -1), (100.0, 0), (110.0, 1)):  # pretraining, then two laps
        run.log("learner", at_s, 1, {"learner/busy": 1.0, "learner/version": version})
    assert FleetTime(read_run(run.folder)).at(START_UTC_S + 110) == pytest.approx(10)


def _facts(controllers: str, outcome: Outcome = Outcome.SUCCESS) -> EpisodeFacts:
    episode = make_episode(controllers, outcome=outcome)
    return EpisodeFacts(
        key="",
        task=episode.task,
        outcome=outcome,
        policy_version=0,
        num_steps=episode.num_steps,
        human_steps=controllers.count("H"),
        interventions=episode.interventions,
        start_utc_ns=episode.start_utc_ns,
        end_utc_ns=episode.end_utc_ns,
        policy_times=None,
    )


def test_the_strip_shows_a_success_in_which_the_policy_drove_before_and_after() -> None:
    middle = _facts("PPPPHHPPPP")
    others = [
        _facts("HHPPPPPPPP"),  # from the start: nothing was taken over
        _facts("PPPPHHPPPP", Outcome.FAILURE),
        _facts("PPPPPPPPHH"),  # never handed back
        _facts("PHHPPPPPPP"),  # far from the middle
        _facts("PPPHPPPHPP"),  # two corrections
    ]
    strip = choose([*others, middle])
    assert strip is not None
    assert strip.episode is middle
    assert (strip.correction.start, strip.correction.stop) == (4, 6)
    assert choose(others[:2]) is None


def test_frames_include_start_takeover_hand_back_and_end() -> None:
    mark = Intervention(30, 50, "stand-in", "stall")
    steps = frames_to_show(100, mark)
    assert steps == sorted(set(steps))
    assert len(steps) == 10
    assert {0, 30, 50, 99} <= set(steps)
    assert int(np.diff(steps).max()) <= 15
    assert frames_to_show(5, Intervention(2, 5, "stand-in", "stall")) == [0, 1, 2, 3, 4]


def test_the_strip_paints_both_controllers(whole_run: RunDirectory) -> None:
    record = read_run(whole_run.folder)
    strip = choose(record.episodes)
    assert strip is not None
    picture = film_strip(record, strip)
    assert picture is not None
    pixels = (imread(io.BytesIO(picture))[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for color in (POLICY, HUMAN):
        wanted = (np.array(to_rgb(color)) * 255).round().astype(int)
        assert (abs(pixels - wanted).max(axis=1) <= 1).sum() > 1000


def test_the_report_needs_no_torch() -> None:
    code = "import sys, sop.report, sop.live; print([name for name in ('torch', 'rich') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "['rich']\n"


def test_the_numbers_of_the_page_are_those_of_the_summary(whole_run: RunDirectory, page: str) -> None:
    summary = summarise(whole_run.folder)
    assert f"<td>learner steps</td><td>{summary['learner_steps']}</td>" in page
    assert f"<td>policies published</td><td>{summary['publishes']}</td>" in page
