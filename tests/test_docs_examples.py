"""Examples in the documentation that are whole programs are executed."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sop.algorithms import ALGORITHMS, make_algorithm
from sop.testing.contracts.algorithm import ALGORITHM_RULES, CONTROL_HZ, MakeAlgorithm
from sop.testing.contracts.store import STORE_RULES, OpenStore

DOCS = Path(__file__).parents[1] / "docs"
FASTEST_HALF = Path(__file__).parents[1] / "examples" / "fastest_half.py"


def example(page: str, contains: str) -> dict[str, Any]:
    """The names that the one Python block with this text defines."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if contains in block]
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, page, "exec"), names)  # noqa: S102 - our own documentation
    return names


@pytest.mark.parametrize("rule", STORE_RULES, ids=lambda rule: rule.__name__)
def test_the_store_on_the_page_about_extending_keeps_the_contract(
    rule: Callable[[OpenStore], None], tmp_path: Path
) -> None:
    store = example("extending.md", "class SqliteStore")["SqliteStore"]
    rule(lambda: store(str(tmp_path / "store.sqlite")))


def test_the_learning_rule_on_the_page_about_extending_is_the_file_in_examples() -> None:
    assert f"```python\n{FASTEST_HALF.read_text()}```\n" in (DOCS / "extending.md").read_text()


@pytest.mark.parametrize("rule", ALGORITHM_RULES, ids=lambda rule: rule.__name__)
def test_the_learning_rule_in_examples_keeps_the_contract(
    rule: Callable[[MakeAlgorithm], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "fastest_half", ALGORITHMS["bc"])  # what the example enters goes after the test
    runpy.run_path(str(FASTEST_HALF))
    rule(lambda: make_algorithm("fastest_half", {"slow_weight": 0.1}, CONTROL_HZ))


def test_the_learning_rule_in_examples_checks_itself_when_it_is_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "fastest_half", ALGORITHMS["bc"])
    runpy.run_path(str(FASTEST_HALF), run_name="__main__")
    assert capsys.readouterr().out.count("kept: ") == len(ALGORITHM_RULES)
