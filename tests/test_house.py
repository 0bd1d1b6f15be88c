"""`./dev house` finds what is too large and what imports in a circle, and is silent where there is nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def house(root: Path) -> tuple[int, list[str]]:
    """The exit status and the lines that it printed for the tree under `root`."""
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "house.py"), str(root)], capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def function(lines: int, name: str = "f", indent: str = "") -> str:
    return f"{indent}def {name}():\n" + f"{indent}    x = 1\n" * (lines - 1)


def test_a_small_tree_is_silent(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "torchsat/a.py": "from torchsat import b\n" + function(60),
            "torchsat/b.py": "x = 1\n",
            "tests/test_a.py": "x = 1\n" * 600,
            "docs/tables.py": "x = 1\n" * 500,
        },
    )
    assert house(tmp_path) == (0, [])


def test_files_are_measured_by_their_kind_and_place(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"torchsat/a.py": "x = 1\n" * 501, "tests/test_a.py": "x = 1\n" * 601, "tests/test_b.py": function(580), "tools/b.py": "x = 1\n" * 501},
    )
    (tmp_path / "torchsat" / "page.js").write_text("let x;\n" * 502)
    (tmp_path / "torchsat" / "kernel.c").write_text("int x;\n" * 503)
    (tmp_path / "torchsat" / "style.css").write_text("p {}\n" * 900)
    (tmp_path / "dev").write_text("x = 1\n" * 504)
    assert house(tmp_path) == (
        1,
        [
            "torchsat/a.py:1: the file has 501 lines, 500 are allowed",
            "torchsat/kernel.c:1: the file has 503 lines, 500 are allowed",
            "torchsat/page.js:1: the file has 502 lines, 500 are allowed",
            "tests/test_a.py:1: the file has 601 lines, 600 are allowed",
            "tools/b.py:1: the file has 501 lines, 500 are allowed",
            "dev:1: the file has 504 lines, 500 are allowed",
        ],
    )


def test_classes_and_functions_are_measured_from_their_decorator_to_their_end(tmp_path: Path) -> None:
    long = "class Long:\n" + "    x = 1\n" * 250
    fits = "@decorator\nclass Fits:\n" + function(61, "method", "    ") + "    x = 1\n" * 187
    decorated = "@decorator(\n    1,\n)\n" + function(58, "decorated")
    write(
        tmp_path, {"torchsat/a.py": long, "torchsat/b.py": fits, "examples/b.py": function(60, "fits") + decorated + "async " + function(61, "waits")}
    )
    assert house(tmp_path) == (
        1,
        [
            "torchsat/a.py:1: class Long has 251 lines, 250 are allowed",
            "torchsat/b.py:3: function method has 61 lines, 60 are allowed",
            "examples/b.py:64: function decorated has 61 lines, 60 are allowed",
            "examples/b.py:122: function waits has 61 lines, 60 are allowed",
        ],
    )


def test_the_docstring_of_a_function_does_not_count(tmp_path: Path) -> None:
    docstring = '    """First.\n\n' + "    More.\n" * 40 + '    """\n'
    write(tmp_path, {"torchsat/a.py": "def f():\n" + docstring + "    x = 1\n" * 59, "torchsat/b.py": "def f():\n" + docstring + "    x = 1\n" * 60})
    assert house(tmp_path) == (1, ["torchsat/b.py:1: function f has 61 lines, 60 are allowed"])


def test_nothing_of_torchsat_imports_in_a_circle() -> None:
    _, lines = house(ROOT)
    assert [line for line in lines if "imports in a circle" in line] == []


@pytest.mark.parametrize(
    "statement",
    [
        "from torchsat.low import x",
        "from torchsat import low",
        "import torchsat.low",
        "from . import low",
        "from .low import x",
        "def f():\n    import torchsat.low",
    ],
)
def test_a_circle_is_found_however_the_import_is_written(statement: str, tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "torchsat/__init__.py": "",
            "torchsat/high.py": "\n" + statement,
            "torchsat/low.py": "def late():\n    from torchsat.high import y\n",
            "torchsat/alone.py": "",
        },
    )
    line = 3 if statement.startswith("def") else 2
    expected = f"torchsat/high.py:{line}: imports in a circle of 2: torchsat.high -> torchsat.low -> torchsat.high"
    assert house(tmp_path) == (1, [expected])


def test_a_circle_through_packages_is_one_line_and_the_shortest(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "torchsat/ranks/__init__.py": "from .layout import x\n",
            "torchsat/ranks/layout.py": "from ..monitor import x\n",
            "torchsat/monitor.py": "from torchsat import middle, ranks\n",
            "torchsat/middle.py": "from torchsat import ranks\n",
        },
    )
    circle = ["torchsat.middle", "torchsat.ranks", "torchsat.ranks.layout", "torchsat.monitor", "torchsat.middle"]
    assert house(tmp_path) == (1, [f"torchsat/middle.py:1: imports in a circle of 4: {' -> '.join(circle)}"])


def test_imports_for_type_checkers_make_no_circle(tmp_path: Path) -> None:
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torchsat import {}\nelse:\n    from torchsat import {}\n"
    write(tmp_path, {"torchsat/a.py": guarded.format("b", "c"), "torchsat/b.py": "from torchsat import a\n", "torchsat/c.py": ""})
    assert house(tmp_path) == (0, [])
    write(tmp_path, {"torchsat/c.py": "from torchsat import a\n"})
    assert house(tmp_path) == (1, ["torchsat/a.py:5: imports in a circle of 2: torchsat.a -> torchsat.c -> torchsat.a"])
