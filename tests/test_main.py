import os
import subprocess
import sys

import pytest

import lightning_iclr
from lightning_iclr.__main__ import main
from lightning_iclr._recipes import find_recipe, list_recipes, recipe_root


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_says_how_to_use_the_command(capsys, arguments):
    main(arguments)
    out = capsys.readouterr().out
    assert "usage: lightning-iclr {fit,validate,test,predict} --config RECIPE" in out
    assert "lightning-iclr recipes [--copy RECIPE]" in out


def test_version_is_the_package_s(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{lightning_iclr.__version__}\n"


def test_recipes_is_a_table_with_a_row_for_each_file(capsys):
    main(["recipes"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "shows", "data", "minutes", "devices"]
    files = {str(p.relative_to(recipe_root()))[:-5] for p in recipe_root().rglob("*.yaml")}
    assert {row.split()[0] for row in rows} == files
    (digits,) = (row for row in rows if row.startswith("vit/digits "))
    assert digits.index("embedded") == header.index("data")
    assert digits.index("1 CPU") == header.index("devices")


def test_copy_writes_the_recipe_into_the_working_folder_and_overwrites_nothing(capsys, tmp_path):
    main(["recipes", "--copy", "vit/digits"])
    assert (tmp_path / "digits.yaml").read_bytes() == (recipe_root() / "vit/digits.yaml").read_bytes()
    (tmp_path / "digits.yaml").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["recipes", "--copy", "vit/digits"])
    assert stop.value.code == 2
    assert "digits.yaml exists in the working folder" in capsys.readouterr().err
    assert (tmp_path / "digits.yaml").read_text() == "mine"


@pytest.mark.parametrize("arguments", [["--copy", "vit/no_such"], ["--copy"], ["--all"]])
def test_a_wrong_recipes_command_is_one_line_and_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(["recipes", *arguments])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", ["vit/digits", "vit/digits.yaml", "recipes/vit/digits.yaml"])
def test_a_recipe_is_found_by_any_of_its_names_from_any_folder(name):
    assert find_recipe(name) == str(recipe_root() / "vit/digits.yaml")


def test_a_file_of_the_user_wins_over_a_recipe(tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/digits.yaml").write_text("trainer: null")
    assert find_recipe("vit/digits.yaml") == "vit/digits.yaml"
    assert find_recipe("trainer: {max_steps: 3}") == "trainer: {max_steps: 3}"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipes"]])
def test_what_needs_no_training_imports_nothing_heavy(arguments):
    code = (
        "import sys; from lightning_iclr.__main__ import main; main(sys.argv[1:]);"
        "print(sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)), file=sys.stderr)"
    )
    root = str(recipe_root().parent)
    environment = {**os.environ, "PYTHONPATH": root}  # without the offline guard, which imports nothing either
    result = subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stderr.strip() == "['__main__', 'lightning_iclr']"


def test_every_name_in_the_list_is_found():
    assert len(list_recipes()) >= 8
    for name in list_recipes():
        assert find_recipe(name).endswith(f"{name}.yaml")
