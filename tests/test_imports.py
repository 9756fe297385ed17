import ast
from pathlib import Path

import pytest

import lightning_iclr
from lightning_iclr._imports import optional_import

PACKAGE = Path(lightning_iclr.__file__).parent
GROUND_FLOOR = {path.stem for path in PACKAGE.glob("*.py")} | {"embedded"}
METHODS = sorted(path.parent.name for path in PACKAGE.glob("*/module.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    with pytest.raises(ModuleNotFoundError, match=r"no_such.thing is needed .*pip install 'lightning-iclr\[text\]'"):
        optional_import("no_such.thing", "text")


def test_a_package_that_is_broken_inside_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "broken_inside.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'no_such_dependency'$"):
        optional_import("broken_inside", "text")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floors_import_downwards_only(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in filter(None, imports(path)):
        parts = name.split(".")
        if parts[0] == "lightning_iclr" and len(parts) > 1:
            assert parts[1] in (GROUND_FLOOR | ({room} if room in METHODS else set())), f"{path.name} imports {name}"
        if path.name == "model.py":
            assert parts[0] != "lightning"
        assert parts[0] != "torchvision"


@pytest.mark.parametrize("method", METHODS)
def test_all_names_exist_and_have_a_docstring(method):
    module = __import__(f"lightning_iclr.{method}", fromlist=["__all__"])
    assert sorted(module.__all__) == module.__all__
    for name in module.__all__:
        assert getattr(module, name).__doc__, name
