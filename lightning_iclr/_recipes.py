"""Find the recipes by their short names; standard library only, so that listing them is instant."""

import shutil
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
HEADER = ("shows", "data", "minutes", "devices", "run")


def recipe_root() -> Path:
    """Return the folder of recipes: inside the wheel, or beside the package in a checkout."""
    packaged, checkout = _PACKAGE / "recipes", _PACKAGE.parent / "recipes"
    if packaged.is_dir():
        return packaged
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():  # not a stranger's site-packages/recipes
        return checkout
    raise FileNotFoundError("the recipes are missing from this install of lightning-iclr; reinstall it from a wheel")


def list_recipes() -> list[str]:
    """Return all short names."""
    root = recipe_root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_recipe(name: str) -> str:
    """Return the packaged file of a short name; a file that exists, or inline YAML, comes back unchanged.

    Raises:
        FileNotFoundError: The name has the form of a recipe's, and there is none.
    """
    if "\n" in name or ":" in name or Path(name).is_file():
        return name
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    path = recipe_root() / f"{short}.yaml"
    if path.is_file():
        return str(path)
    raise FileNotFoundError(f"no recipe or file {name!r}; `lightning-iclr recipes` lists the recipes")


def recipe_header(name: str) -> dict[str, str]:
    """Return a recipe's header comments: what it shows, its data, minutes, devices, and the command to run."""
    header: dict[str, str] = {}
    for line in (recipe_root() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        key, separator, value = line.removeprefix("#").partition(":")
        if separator and key.strip() in HEADER:
            header[key.strip()] = value.strip()
    return header


def recipe_table() -> str:
    """Return a table of all recipes."""
    columns = ("shows", "data", "minutes", "devices")
    rows: list[tuple[str, ...]] = [("name", *columns)]
    for name in list_recipes():
        header = recipe_header(name)
        rows.append((name, *(header.get(column, "") for column in columns)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def copy_recipe(name: str) -> Path:
    """Copy a recipe into the working folder under its last name, for editing.

    Raises:
        FileNotFoundError: There is no such recipe.
        FileExistsError: A file of that name is there already.
    """
    source = Path(find_recipe(name))
    target = Path(source.name)
    if target.exists():
        raise FileExistsError(f"{target} exists in the working folder; move it away first")
    shutil.copyfile(source, target)
    return target
