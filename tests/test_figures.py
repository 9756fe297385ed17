import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_iclr.figures import show
from tests.distributed import Ranks, run_distributed


@pytest.fixture
def figure():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    return figure


def test_a_figure_is_a_png_in_the_run_folder(tmp_path, figure):
    trainer = Trainer(logger=CSVLogger(tmp_path, name="runs"), accelerator="cpu")
    path = show(figure, "curve", trainer)
    assert path == tmp_path / "runs/version_0/figures/curve.png"
    with Image.open(path) as image:
        assert image.size == (240, 120)


def test_a_run_without_a_logger_keeps_its_figures_in_the_root(tmp_path, figure):
    assert show(figure, "curve", Trainer(logger=False, default_root_dir=tmp_path, accelerator="cpu")).is_file()
    assert (tmp_path / "figures/curve.png").is_file()


def test_tensorboard_gets_the_same_figure(tmp_path, figure):
    logger = TensorBoardLogger(tmp_path)
    path = show(figure, "curve", Trainer(logger=logger, accelerator="cpu"))
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    (image,) = events.Images("curve")
    assert image.height / image.width == pytest.approx(1 / 2)
    assert path.stat().st_size > 500
    logger.experiment.close()


def test_only_rank_zero_writes_and_all_ranks_agree_on_the_path(tmp_path):
    class Counted(Figure):
        writes = 0

        def savefig(self, *args, **options):
            Counted.writes += 1
            super().savefig(*args, **options)

    def draw():
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp", plugins=[Ranks()], logger=CSVLogger(tmp_path, name="runs")
        )
        trainer.strategy.setup_environment()
        return {"path": str(show(Counted(), "curve", trainer)), "writes": Counted.writes}

    first, second = run_distributed(draw)
    assert first["path"] == second["path"] == str(tmp_path / "runs/version_0/figures/curve.png")
    assert (first["writes"], second["writes"]) == (1, 0)


def test_a_fast_development_run_leaves_nothing_behind(tmp_path, figure):
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
    show(figure, "curve", trainer)
    assert not list(tmp_path.rglob("*.png"))
