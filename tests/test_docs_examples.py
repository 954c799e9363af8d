"""Examples in the documentation that are whole programs are executed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sop.testing.contracts.store import STORE_RULES, OpenStore

DOCS = Path(__file__).parents[1] / "docs"


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
