"""The shape of the source: imports run one way, files and functions stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "drcnn"

# A module may import from its own layer and from those before it.
LAYERS = [
    {"errors"},
    {"_C", "kernels"},
    {"ops"},
    {"structures", "dynamics"},
    {"models"},
    {"weights"},
    {"data"},
    {"engine"},
    {"command", "config", "loading", "tta", "arguments"},
    {
        "presets",
        "sparse_presets",
        "cli",
        "train",
        "eval",
        "check",
        "compare",
        "predict",
        "export",
        "benchmark",
        "convert",
        "plot",
        "report",
        "completion",
        "doctor",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def layer_of(file: Path) -> str:
    if file.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(tree: ast.Module) -> list[tuple[int, str]]:
    """Top names under ``drcnn`` that a file imports when it runs; imports for annotations do not count."""
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "drcnn":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("drcnn.")]
        found += [(node.lineno, name) for name in names]
    return found


def test_imports_run_one_way():
    wrong = []
    for file in sources():
        own = layer_of(file)
        if own == "__init__":
            continue  # The package's front door hands out names of every layer, on demand.
        assert own in LEVEL, f"{file} belongs to no layer; add {own} to LAYERS"
        for line, name in imported_layers(ast.parse(file.read_text())):
            if name in LEVEL and LEVEL[name] > LEVEL[own]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_the_search_for_imports_finds_them():
    tree = ast.parse(
        "from drcnn.engine.trainer import Trainer\nimport drcnn.models\nfrom drcnn import presets"
    )
    assert [name for _, name in imported_layers(tree)] == ["engine", "models", "presets"]


@pytest.mark.parametrize("name", ["utils", "misc", "helpers", "common"])
def test_no_file_without_a_meaning(name):
    assert not [file for file in sources() if file.stem == name]


def test_files_and_functions_are_small():
    large = []
    for file in sources():
        text = file.read_text()
        if text.count("\n") > 400:
            large.append(f"{file.relative_to(ROOT)} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documented = ast.get_docstring(node, clean=False) or ""
                length = node.end_lineno - node.lineno + 1 - documented.count("\n")
                if length > 60:
                    large.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines")
    assert not large


def test_no_model_asks_whether_training_is_dynamic():
    for file in (PACKAGE / "models").glob("*.py"):
        tests = [ast.unparse(n.test) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.If)]
        assert not [test for test in tests if "dynamic" in test.lower() or "isinstance" in test], file
