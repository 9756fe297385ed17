"""The command `lightning-iclr`; what needs no training needs no torch."""

import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_iclr import __version__
from lightning_iclr._recipes import copy_recipe, recipe_table

USAGE = f"""lightning-iclr {__version__}

usage: lightning-iclr {{fit,validate,test,predict}} --config RECIPE [--config MORE] [--KEY VALUE ...] [--debug]
       lightning-iclr recipes [--copy RECIPE]
       lightning-iclr pmi-vocabulary --data DATA --out FILE [--KEY VALUE ...]
       lightning-iclr pmi-finetune --recipe RECIPE --out FOLDER [--KEY VALUE ...]

  fit --config vit/digits        train a recipe; overrides go after --config
  test --config vit/digits --ckpt_path FILE
                                 test what was trained; `validate` and `predict` likewise
  fit --help                     all options
  recipes                        list the recipes; --copy writes one into the working folder
  pmi-vocabulary --help          build a masking vocabulary from a corpus
  pmi-finetune --help            fine-tune over a grid with several seeds
  --debug                        show the whole traceback of an error
"""

# Methods' own tools: the functions whose arguments are the options.
_TOOLS = {
    "pmi-finetune": "lightning_iclr.pmi_masking.grid.finetune_grid",
    "pmi-vocabulary": "lightning_iclr.pmi_masking.command.build_vocabulary",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Its arguments; ``None`` takes those of the process.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if not argv or argv in (["-h"], ["--help"]):
        print(USAGE)
    elif argv == ["--version"]:
        print(__version__)
    elif argv[0] == "recipes":
        _recipes(argv[1:])
    elif argv[0] in _TOOLS:
        from lightning_iclr.cli import run_tool

        module, _, function = _TOOLS[argv[0]].rpartition(".")
        run_tool(getattr(import_module(module), function), argv[0], argv[1:])
    else:
        from lightning_iclr.cli import run

        run(argv)


def _recipes(argv: list[str]) -> None:
    try:
        if not argv:
            print(recipe_table())
        elif argv in (["-h"], ["--help"]):
            print("usage: lightning-iclr recipes [--copy RECIPE]")
        elif len(argv) == 2 and argv[0] == "--copy":
            print(f"wrote {copy_recipe(argv[1])}")
        else:
            raise ValueError("usage: lightning-iclr recipes [--copy RECIPE]")
    except (OSError, ValueError) as error:
        print(f"lightning-iclr: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
