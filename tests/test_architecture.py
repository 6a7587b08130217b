"""The house: who may know whom, and how large anything may grow."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_bituning"
BENCH = ROOT / "examples" / "benchmarks" / "bench"
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}

#: From the ground up; a room, or a file of the top level, imports from floors below and from itself.
FLOORS = (
    ("errors",),
    ("artifacts", "launch", "matmul"),
    ("block_file", "losses", "metrics"),
    ("tuners.rows",),
    ("tuners",),  # what both methods share: layer, files, registration
    ("tuners.bituning", "tuners.ilora"),
    ("data",),
    ("recommenders",),
    ("base_models",),
    ("catalog",),
    ("assembly", "evaluation"),
    ("serving",),
    ("training",),
    ("batch", "integrations", "ssna"),
    ("__init__",),
)
#: What somebody reads who wants to know Laser and nothing else.
LASER = (
    "tuners/rows/*.py",
    "tuners/adapter_layer.py",
    "tuners/embedding_tuner.py",
    "tuners/bituning/config.py",
    "tuners/bituning/layer.py",
    "tuners/bituning/model.py",
    "tuners/bituning/encoders/base.py",
    "tuners/bituning/encoders/mformer.py",
    "losses/*.py",
    "data/interactions.py",
    "data/items.py",
    "data/samples.py",
    "data/templates.py",
    "data/prompts.py",
    "data/collator.py",
    "recommenders/base.py",
    "recommenders/transformer.py",
    "recommenders/sasrec.py",
    "catalog/encoder.py",
    "catalog/item_table.py",
    "assembly.py",
    "training/fit.py",
    "training/stages.py",
    "training/stage_rows.py",
    "training/update.py",
    "serving/recommender.py",
)
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
#: Functions that read better in one piece.
LONG_FUNCTIONS: set[str] = set()


def room_of(module: str) -> str:
    """Return the floor's entry that a module belongs to."""
    inside = module.removeprefix("peft_bituning").removeprefix(".") or "__init__"
    names = [name for floor in FLOORS for name in floor if inside == name or inside.startswith(f"{name}.")]
    assert names, f"{module} belongs to no room"
    return max(names, key=len)


def imports_of(module: str) -> Iterator[tuple[str, bool]]:
    """Yield the modules of the package that one imports, and whether at once, not inside of a function."""
    tree = ast.parse(FILES[module].read_text())
    at_once = {id(node) for node in ast.walk(tree)} - {
        id(node)
        for part in ast.walk(tree)
        if isinstance(part, ast.FunctionDef) or (isinstance(part, ast.If) and "TYPE_CHECKING" in ast.dump(part.test))
        for node in ast.walk(part)
    }
    package = module.removesuffix(".__init__") if module.endswith("__init__") else module.rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" if f"{start}.{alias.name}" in FILES else start for alias in node.names]
            names = [f"{name}.__init__" if f"{name}.__init__" in FILES else name for name in names]
        for name in dict.fromkeys(names):
            if name.split(".")[0] in ("peft_bituning", "bench"):
                yield name, id(node) in at_once


def functions() -> Iterator[tuple[str, int]]:
    """Yield every function's place and its lines."""
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                yield f"{module}.{node.name}", node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down(module: str) -> None:
    height = {name: level for level, floor in enumerate(FLOORS) for name in floor}
    room = room_of(module)
    for name, at_once in imports_of(module):
        assert name.split(".")[0] != "bench", f"{module} imports the bench, which is not installed"
        other = room_of(name.removesuffix(".__init__") if name != "peft_bituning.__init__" else "peft_bituning")
        if at_once and other != room:
            assert height[other] < height[room], f"{module} ({room}) imports {name} ({other}) from above"


def test_no_circle() -> None:
    """A package's own `__init__` is no step of a circle: its modules run while it does."""
    graph = {
        module: {name for name, at_once in imports_of(module) if at_once and not module.startswith(name[:-8])}
        for module in FILES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_readers_are_known_to_the_door_alone() -> None:
    for module in FILES:
        if module.startswith("peft_bituning.data.") and ".readers." not in module and not module.endswith("__init__"):
            assert not [name for name, _ in imports_of(module) if ".readers." in name], module


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), *BENCH.rglob("*.py")]), ids=lambda path: path.name)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def test_no_function_is_too_long() -> None:
    assert {name for name, lines in functions() if lines > LONGEST_FUNCTION} == LONG_FUNCTIONS


def test_sizes() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in FILES.values()}
    assert len(FILES) <= 150
    assert sum(lines.values()) <= 16_200
    way = {path for pattern in LASER for path in PACKAGE.glob(pattern)}
    assert sum(lines[path] for path in way) <= 5_000


def test_no_assert_and_no_drawer() -> None:
    for module, path in FILES.items():
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), module
        assert path.stem not in ("utils", "helpers", "common", "misc"), module
