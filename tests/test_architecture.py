"""The rules of the house, executed: imports point down, no pickle, no torch on the robot, nothing oversized."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "sop"
MODULES = sorted(ROOT.rglob("*.py"))

MAY_IMPORT = {
    "core": set(),
    "transport": {"core"},
    "trust": {"core", "transport"},
    "broadcast": {"core", "transport", "trust"},
    "buffer": {"core", "transport"},
    "policies": {"core"},
    "values": {"core", "policies"},
    "algorithms": {"core", "values"},
    "robots": {"core"},
    "operators": {"core"},
    "actor": {"core", "transport", "broadcast", "operators"},
    "fleet": {"core", "transport", "trust"},
    "rollout": {"core", "transport", "broadcast", "trust"},
    "learner": {"core", "transport", "buffer", "algorithms", "broadcast", "policies"},
}
EVERYWHERE = {"config", "metrics"}
NO_TORCH = {"core", "transport", "trust", "broadcast", "buffer", "actor", "robots", "operators", "fleet", "rollout"}
STANDARD_LIBRARY_ONLY = {"config.py", "metrics.py"}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "misc"}
MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 60


def imports(path: Path) -> set[str]:
    """Absolute dotted names imported by a file, relative imports resolved; imports for type checkers excluded."""
    package = ("sop", *path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            found |= {".".join(filter(None, (base, node.module, alias.name))) for alias in node.names}
    return found


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_point_down(package: str) -> None:
    allowed = MAY_IMPORT[package] | EVERYWHERE | {package}
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        names = [name.split(".") for name in imports(path)]
        inside = {parts[1] for parts in names if parts[0] == "sop" and len(parts) > 1}
        assert inside <= allowed, f"{path.relative_to(ROOT)} imports {inside - allowed}"
        roots = {parts[0] for parts in names}
        assert package not in NO_TORCH or not roots & {"torch", "jax"}, f"{path.relative_to(ROOT)} imports torch/jax"


def test_every_package_has_a_place_in_the_rule() -> None:
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert packages - {"chaos", "commands", "experiments", "report", "testing"} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", sorted(STANDARD_LIBRARY_ONLY))
def test_config_and_metrics_need_nothing(name: str) -> None:
    roots = {imported.split(".")[0] for imported in imports(ROOT / name)}
    assert roots <= sys.stdlib_module_names


def test_only_tests_import_the_fakes() -> None:
    for path in MODULES:
        if "testing" not in path.relative_to(ROOT).parts:
            assert not any(name.startswith("sop.testing") for name in imports(path)), path


def test_nothing_is_pickled_anywhere() -> None:
    for path in MODULES:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & FORBIDDEN, f"{path.relative_to(ROOT)} imports {roots & FORBIDDEN}"
        text = path.read_text()
        assert "allow_pickle=True" not in text
        assert not re.search(r"(?<!safetensors\.)\btorch\.(load|save)\b", text), path
        assert "multiprocessing" not in " ".join(imports(path))


def test_modules_and_functions_fit_a_screen() -> None:
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= MAX_MODULE_LINES, f"{path} has {text.count(chr(10))} lines"
        assert path.stem not in FORBIDDEN_NAMES
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_every_public_name_has_a_docstring() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                inside_private = any(
                    isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                    and (not isinstance(outer, ast.ClassDef) or outer.name.startswith("_"))
                    and node in ast.walk(outer)
                    and outer is not node
                    for outer in ast.walk(tree)
                )
                assert inside_private or ast.get_docstring(node), f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("package", ["sop.actor", "sop.core.codec", "sop.buffer", "sop.broadcast", "sop.cli"])
def test_the_robot_side_and_the_command_line_load_no_torch(package: str) -> None:
    code = f"import {package}, sys; print(sorted({{'torch', 'mujoco', 'matplotlib'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
