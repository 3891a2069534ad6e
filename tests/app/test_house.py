"""The rules of the house that no import contract can check."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import create_autospec

import pytest

import celery_eda
from celery_eda import EDA

PACKAGE = Path(celery_eda.__file__).parent
#: Modules that all wings may import from directly.
OPEN = ("core", "errors")
#: Places that may reach the whole service through the Celery app.
REACHES_EDA = ("app", "ops", "core/service.py")
RIDDLES = re.compile(r"(What|Whether|Who|Whom|Whose|Those|That|How|Where)\b")
MOST_LINES = 400
#: Lists of columns, which nobody reads from beginning to end.
LISTS_OF_TABLES = ("databases/tables.py", "databases/migrations/versions/r0001_initial.py")


def _modules() -> Iterator[tuple[str, str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        yield str(path.relative_to(PACKAGE)), text, ast.parse(text)


def _documented(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def test_the_folder_shows_the_architecture() -> None:
    entries = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "py.typed", "__pycache__"}

    assert len(entries) <= 15, sorted(entries)


def test_a_wing_takes_from_another_wing_what_its_face_names() -> None:
    deep = []
    for name, _, tree in _modules():
        wing = name.split("/")[0].removesuffix(".py")
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "celery_eda."
            ):
                continue
            _, other, *inside = (node.module or "").split(".")
            if inside and other != wing and other not in OPEN:
                deep.append(f"{name}:{node.lineno} imports from {node.module}")

    assert deep == []


def test_each_face_names_what_it_offers() -> None:
    for path in PACKAGE.iterdir():
        if not path.is_dir() or path.name in ("__pycache__", "core"):
            continue
        face = ast.parse((path / "__init__.py").read_text())
        imported = {
            alias.asname or alias.name
            for node in ast.walk(face)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        } - {"annotations"}
        named = [
            element.value
            for node in face.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            for element in ast.walk(node.value)
            if isinstance(element, ast.Constant)
        ]

        assert imported == set(named), path.name


def test_only_the_app_wing_and_the_commands_reach_the_whole_service() -> None:
    reaching = [
        f"{name}:{number}"
        for name, text, _ in _modules()
        if not name.startswith(REACHES_EDA)
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(r"\bapp\.eda\b", line)
    ]

    assert reaching == []


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    riddles = [
        f"{name}: {doc.splitlines()[0]}"
        for name, _, tree in _modules()
        for doc in _documented(tree)
        if RIDDLES.match(doc)
    ]

    assert riddles == []


def test_no_tuple_is_unpacked_where_it_is_written() -> None:
    starred = [
        f"{name}:{node.lineno}"
        for name, _, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple)
    ]

    assert starred == []


def test_no_module_is_too_long_to_read_in_one_sitting() -> None:
    long = {
        name: lines
        for name, text, _ in _modules()
        if (lines := len(text.splitlines())) >= MOST_LINES and name not in LISTS_OF_TABLES
    }

    assert long == {}


def test_eda_can_be_inspected_and_mocked() -> None:
    members = dict(inspect.getmembers(EDA))
    mock = create_autospec(EDA)

    assert {"emit", "request", "session", "transaction"} <= members.keys()
    mock.return_value.emit("order.placed", key=7)
    with pytest.raises(TypeError):
        mock.return_value.emit()
