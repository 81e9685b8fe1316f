"""Packages import only those below them: `python tests/test_imports.py`."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tutornet_sb"
# From the lowest up
LAYERS = [
    "util",
    "corpora",
    "networks",
    "distillation",
    "teachers",
    "targets",
    "inference",
    "training",
    "experiments",
    "publishing",
    "cli",
]


def find_imports():
    """By package, the packages that its modules import, wherever they do."""
    graph = {layer: set() for layer in LAYERS}
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if layer == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or "."]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            for module in modules:
                if module.startswith("tutornet_sb."):
                    graph[layer].add(module.split(".")[1])
    return graph


def test_no_package_imports_one_above_it():
    for layer, imported in find_imports().items():
        above = LAYERS[LAYERS.index(layer) + 1 :]
        assert not imported & set(above), layer


if __name__ == "__main__":
    for layer, imported in reversed(find_imports().items()):
        below = [other for other in LAYERS if other in imported - {layer}]
        print(f"{layer:12} -> {', '.join(below) or '-'}")
