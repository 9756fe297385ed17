"""One way to show a picture: a PNG in the run folder, and the same figure in the logger."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure


def show(figure: Figure, name: str, trainer: Trainer) -> Path:
    """Write a figure to ``<run folder>/figures/<name>.png`` and to the loggers that take figures.

    To be called on every rank, since the run folder is agreed on between them; only rank zero writes, and nothing is
    written under ``fast_dev_run``, which has no run folder.

    Args:
        figure: The figure.
        name: Name of the file, without its suffix.
        trainer: The Trainer whose run the figure belongs to.

    Returns:
        The file's path.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    path = Path(folder) / "figures" / f"{name}.png"
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure, trainer.global_step, close=False)
    return path
