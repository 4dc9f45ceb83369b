"""The rooms of the package and the one direction of its imports."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tinyvit"

# From top to bottom: a room imports from itself and from rooms below it.
ROOMS = (
    "__init__",  # the public names
    "__main__",
    "cli",
    "commands",
    "viz",
    "training",
    "evaluation",
    "checkpoints",
    "models",
    "execution",
    "nn",
    "functional",
    "optim",
    "engine",
    "data",
    "kernels",
    "distributed",
    "backend",
    "files",
    "errors",
    "_version",
)


def modules() -> dict[str, Path]:
    """Every module of the package, by its name without "tinyvit."."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that the file at `path` imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module.partition(".")[0] != "tinyvit":
                continue
            module = module.removeprefix("tinyvit").removeprefix(".") or "__init__"
            submodule = name if module == "__init__" else f"{module}.{name}"
            found.add(submodule if submodule in known else module)
    return found


@cache
def arrows() -> dict[str, set[str]]:
    """What each module imports, without itself."""
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def test_every_room_is_in_the_table():
    assert {name.partition(".")[0] for name in modules()} == set(ROOMS)


def test_imports_go_down():
    upward = [
        f"{name} imports {other}"
        for name, others in arrows().items()
        for other in others
        if ROOMS.index(other.partition(".")[0]) < ROOMS.index(name.partition(".")[0])
    ]
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other_in_a_circle():
    left = dict(arrows())
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"circles among {', '.join(sorted(left))}"


def test_no_test_file_is_longer_than_450_lines():
    lengths = {path: len(path.read_text().splitlines()) for path in Path(__file__).parent.rglob("*.py")}
    assert not [f"{path}: {lines}" for path, lines in lengths.items() if lines > 450]
