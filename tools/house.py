"""Prints what has grown too large in this repository, and which modules of torchsat import each other in a circle.

    ./dev house          the same as: python tools/house.py [ROOT]

Each finding is one line that starts with the place, `FILE:LINE: `. The exit status is 1 if anything was printed, else 0.

| | allowed lines |
|---|---|
| a file in Python, JavaScript or C | 500; in `tests/` 600 |
| a class | 250 |
| a function or method | 60 |

Classes and functions are measured in Python only, and not in test files: a test that lists many cases is easier to read in one piece. The lines of a
class or function run from its first decorator to its end. The docstring of a function does not count, since a long public docstring is no fault; a
nested function counts as part of the function around it and once more by itself.

For the circles every import statement inside `torchsat/` counts, wherever it stands: one inside a function hides a circle and does not remove it.
Imports under `if TYPE_CHECKING:` never run and are left out. That a module makes Python load the package around it is not counted as an import.
Each group of modules that all reach each other is one line, with a shortest circle through the first module of the group.
"""

import ast
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("torchsat", "tests", "benchmarks", "examples", "docs", "tools")
COMMAND = "dev"
KINDS = (".py", ".js", ".c", ".h")
FILE, TEST_FILE, CLASS, FUNCTION = 500, 600, 250, 60

Graph = dict[str, dict[str, int]]
"""For each module, the modules that it imports, and the line of the first import of each."""


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).parent.parent
    findings = [*oversized(root), *circles(root)]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def oversized(root: Path) -> Iterator[str]:
    """One line for each file, class and function that has more lines than are allowed."""
    for path in sources(root):
        place, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        is_test = place.startswith("tests/")
        lines, allowed = len(text.splitlines()), TEST_FILE if is_test else FILE
        if lines > allowed:
            yield f"{place}:1: the file has {lines} lines, {allowed} are allowed"
        if not is_test and (path.suffix == ".py" or path.name == COMMAND):
            yield from oversized_pieces(ast.parse(text), place)


def sources(root: Path) -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*")) if path.suffix in KINDS]
    return [*found, *(path for path in [root / COMMAND] if path.exists())]


def oversized_pieces(tree: ast.Module, place: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            kind, lines, allowed = "class", length(node), CLASS
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            kind, lines, allowed = "function", length(node) - docstring_lines(node), FUNCTION
        else:
            continue
        if lines > allowed:
            yield f"{place}:{node.lineno}: {kind} {node.name} has {lines} lines, {allowed} are allowed"


def length(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return (node.end_lineno or node.lineno) - first + 1


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node, clean=False) is None:
        return 0
    docstring = node.body[0]
    return (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1


def circles(root: Path) -> Iterator[str]:
    """One line for each group of modules of torchsat that import each other, directly or through others."""
    files = modules(root)
    graph = {name: imports(name, path, set(files)) for name, path in files.items()}
    reached = {name: reachable(graph, name) for name in graph}
    told: set[str] = set()
    for name in sorted(graph):
        if name not in reached[name] or name in told:
            continue
        told |= {other for other in reached[name] if name in reached[other]}
        circle = shortest_circle(graph, name)
        yield f"{files[name].relative_to(root).as_posix()}:{graph[name][circle[1]]}: imports in a circle of {len(circle) - 1}: {' -> '.join(circle)}"


def modules(root: Path) -> dict[str, Path]:
    """The modules of torchsat by their dotted names."""
    found = {}
    for path in sorted((root / "torchsat").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> dict[str, int]:
    """The modules among `known` that the module `name` imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: dict[str, int] = {}
    for node in running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = source(node, package)
            # `from package import name` imports a module where the name is one, else the package itself.
            wanted = [module if (module := f"{origin}.{alias.name}") in known else origin for alias in node.names]
        else:
            continue
        for module in wanted:
            if module in known:
                found.setdefault(module, node.lineno)
    return found


def source(node: ast.ImportFrom, package: str) -> str:
    """The full name of what stands between `from` and `import`, read in a module of `package`."""
    parts = package.split(".")
    outer = parts[: len(parts) - node.level + 1] if node.level else []
    return ".".join([*outer, *filter(None, [node.module])])


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below this one, but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from running(other)
            continue
        yield child
        yield from running(child)


def reachable(graph: Graph, start: str) -> set[str]:
    """The modules that are loaded by importing this one; the module itself is among them only if a circle leads back to it."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph[name])
    return found


def shortest_circle(graph: Graph, start: str) -> list[str]:
    """From `start` back to it, both named."""
    waiting = deque([[start]])
    seen: set[str] = set()
    while waiting:
        path = waiting.popleft()
        for name in graph[path[-1]]:
            if name == start:
                return [*path, start]
            if name not in seen:
                seen.add(name)
                waiting.append([*path, name])
    raise ValueError(f"no circle leads back to {start}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
