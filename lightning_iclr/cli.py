"""The command line: Lightning's own, with recipe names, one-line errors and the command to run next."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # public, by a star import
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_iclr import __version__
from lightning_iclr._recipes import find_recipe

_EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    RuntimeError,  # torch's, of a checkpoint that is damaged or does not fit
    UnpicklingError,
    MisconfigurationException,
)


def run(argv: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; what the user got wrong becomes one line and exit code 2.

    Errors of the user's arguments, data or environment that show before the first batch are told in a line; one that
    interrupts a run keeps its traceback. ``--debug`` keeps all tracebacks. Class paths are looked up in the working
    folder, too.

    Args:
        argv: The arguments after ``lightning-iclr``.
    """
    # What Lightning tells every user of the command, and none can act on.
    for message in ("LightningCLI's args parameter", "The dirpath has changed", ".*isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "💡" not in record.getMessage())
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    debug = "--debug" in argv
    arguments = [argument for argument in argv if argument != "--debug"]
    if debug:
        ICLRCLI(args=arguments, parser_kwargs={"exit_on_error": False})
        return
    begun = Begun()
    try:
        ICLRCLI(args=arguments, begun=begun)
    except _EXPECTED as error:
        if begun.first_batch:
            raise
        _fail(error)


def run_tool(tool: Callable[..., None], name: str, argv: Sequence[str]) -> None:
    """Run a method's own tool, a function whose arguments are the options; errors become one line and exit code 2.

    Args:
        tool: The function; its docstring tells what it and its arguments are.
        name: The sub-command.
        argv: The arguments after it.
    """
    summary = (tool.__doc__ or "").split("\n")[0]
    parser = OneLineParser(prog=f"lightning-iclr {name}", description=summary, allow_abbrev=False)
    parser.add_function_arguments(tool, as_group=False)
    options = parser.instantiate_classes(parser.parse_args(list(argv)))
    try:
        tool(**options.as_dict())
    except _EXPECTED as error:
        _fail(error)


class RecipeFile(ActionConfigFile):
    """``--config`` that also takes a packaged recipe's short name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            path = find_recipe(values)
        except FileNotFoundError as error:
            parser.error(str(error))
        super().__call__(parser, cfg, path, option_string)  # type: ignore[no-untyped-call]


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage of some hundred options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with 2; with ``exit_on_error=False`` raise instead."""
        if not self.exit_on_error:
            super().error(message, ex)
        _fail(message if ex is None else ex)


class ICLRCLI(LightningCLI):
    """Lightning's command line for the packaged recipes.

    A resumed fit keeps the user's model arguments instead of taking the checkpoint's silently. ``test``, ``validate``
    and ``predict`` want a checkpoint, and ``fit`` ends by printing the command that tests its own.
    """

    def __init__(self, begun: Begun | None = None, **kwargs: Any) -> None:
        self.begun = begun or Begun()
        defaults: dict[str, Any] = {
            "seed_everything_default": 0,
            "auto_configure_optimizers": False,  # modules own configure_optimizers; two ways would clash
            "save_config_callback": ReusableConfig,
            "save_config_kwargs": {"overwrite": True},  # else a second run into the same log_dir raises
            "parser_class": OneLineParser,
        }
        parser_kwargs = {"version": __version__, **kwargs.pop("parser_kwargs", {})}
        super().__init__(**{**defaults, **kwargs}, parser_kwargs=parser_kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build the parser with our ``--config``."""
        kwargs.setdefault("dump_header", [f"lightning-iclr=={__version__}"])
        kwargs.setdefault("allow_abbrev", False)  # else a misspelt key may pass for the beginning of another
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="Recipe name or YAML file; may be repeated.")
        return parser

    def _parse_ckpt_path(self) -> None:
        # On --ckpt_path Lightning reads the checkpoint's hyper-parameters over the command line's. For test and
        # predict that is wanted; a fit would silently train another model than the user asked for.
        if self.config.get("subcommand") in ("validate", "test", "predict") and self._keeps_a_recipe():
            super()._parse_ckpt_path()

    def _keeps_a_recipe(self) -> bool:
        """Whether the checkpoint holds a recipe's model section; one of a run in Python does not."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if not path or not Path(path).is_file():
            return False
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return "_class_path" in checkpoint.get("hyper_parameters", {})

    def before_instantiate_classes(self) -> None:
        """Refuse to evaluate untrained weights, and name the newest checkpoint."""
        command = self.config.get("subcommand")
        if command == "fit":
            _check_schedule(self.config[command])
        if command not in ("validate", "test", "predict") or self.config[command].get("ckpt_path"):
            return
        config = self.config[command]
        classes = [config[section].get("class_path") for section in ("model", "data") if config.get(section)]
        newest = newest_checkpoint(Path(config.trainer.default_root_dir or "."), classes)
        if newest is None:
            _fail(f"{command} needs --ckpt_path FILE, and there is no checkpoint here yet; run `fit` first")
        _fail(f"{command} needs --ckpt_path; the newest checkpoint here: --ckpt_path {shlex.quote(str(newest))}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, which keeps the final weights."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.extend([self.begun, FinalCheckpoint()])  # type: ignore[attr-defined]
        return trainer

    def after_fit(self) -> None:
        """Print the command that tests what was trained."""
        path = final_checkpoint(self.trainer)
        if path is not None and self.trainer.is_global_zero and path.is_file():  # a run that had ended writes none
            folder = path.parent.parent
            command = [
                "lightning-iclr",
                "test",
                "--config",
                _short(folder / "config.yaml"),
                "--ckpt_path",
                _short(path),
            ]
            print(f"\nThe run is in {_short(folder)}; test it with\n  {shlex.join(command)}")


class ReusableConfig(SaveConfigCallback):
    """Save a run's configuration without the checkpoint it went on from, which is not that of the run."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        config = config.clone()
        if config.get("ckpt_path"):
            config.ckpt_path = None
        super().__init__(parser, config, **kwargs)


class Begun(Callback):
    """Know whether a run has had its first batch."""

    def __init__(self) -> None:
        self.first_batch = False

    def _begin(self, *_: Any, **__: Any) -> None:
        self.first_batch = True

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin


class FinalCheckpoint(Callback):
    """Write ``checkpoints/last.ckpt`` when a fit ends, wherever the recipe's own checkpoint was written last.

    With ``max_steps`` it is written in the last step: once the loop has ended in mid-epoch, Lightning counts that epoch
    as finished, and a longer run could not go on from there.
    """

    def __init__(self) -> None:
        self.saved_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        path = final_checkpoint(trainer)
        if path is not None and self.saved_step != trainer.global_step:
            self.saved_step = trainer.global_step
            trainer.save_checkpoint(path, weights_only=False)


def final_checkpoint(trainer: Trainer) -> Path | None:
    """Return where a fit's final weights are kept; ``None`` for a run without checkpoints."""
    folder = trainer.log_dir  # agreed on between the ranks: read it on each
    keeps = trainer.checkpoint_callback is not None and not trainer.fast_dev_run  # type: ignore[attr-defined]
    return Path(folder) / "checkpoints" / "last.ckpt" if keeps and folder is not None else None


def newest_checkpoint(root: Path, class_paths: Sequence[str | None] = ()) -> Path | None:
    """Return the newest checkpoint under a folder of runs.

    Args:
        root: The Trainer's ``default_root_dir``.
        class_paths: Classes of the model and of the data; runs with others, as their ``config.yaml`` tells, are left
            out.
    """
    found = [
        path
        for depth in ("", "*/", "*/*/", "*/*/*/")  # run folders by the loggers' names and versions
        for path in root.glob(f"{depth}checkpoints/*.ckpt")
        if _is_run_of(path.parent.parent / "config.yaml", class_paths)
    ]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _is_run_of(config: Path, class_paths: Sequence[str | None]) -> bool:
    if not config.is_file():
        return True
    saved = yaml.safe_load(config.read_text("utf-8"))
    own = [(saved.get(section) or {}).get("class_path") for section in ("model", "data")]
    return all(wanted is None or wanted in own for wanted in class_paths)


def _check_schedule(config: Any) -> None:
    # A schedule is built from an optimizer alone and cannot know how long the Trainer trains.
    schedule = ((config.model or {}).get("init_args") or {}).get("lr_scheduler") or {}
    total, steps = (schedule.get("init_args") or {}).get("total_steps"), config.trainer.max_steps
    if isinstance(total, int) and steps > total:
        warnings.warn(
            f"the learning rate's schedule ends at step {total}, and trainer.max_steps is {steps}; to stretch it, "
            f"add --model.lr_scheduler.total_steps {steps}",
            stacklevel=2,
        )


def _short(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _fail(error: BaseException | str) -> NoReturn:
    message = _readable(error) if isinstance(error, BaseException) else error
    print(f"lightning-iclr: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _readable(error: BaseException) -> str:
    """Return what went wrong and under which key, without the types and values that the parser tried on the way."""
    keys = ".".join(re.findall(r'Parser key "([^"]+)"', str(error)))
    while _raised_by_parser(error):
        inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if inner is None:
            break
        error = inner
    message = re.sub(r'^Parser key "[^"]+":', "", str(error)) or type(error).__name__
    return f"{keys}: {message}" if keys else message


def _raised_by_parser(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("jsonargparse")
