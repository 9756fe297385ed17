import os
import subprocess
import sys

import pytest

from lightning_iclr.__main__ import main
from lightning_iclr._recipes import recipe_root

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["trainer/ddp", "trainer/fsdp"])
def test_an_overlay_of_another_strategy_is_refused_in_a_line(overlay):
    command = [sys.executable, "-m", "lightning_iclr", "fit", "--config", "fedopt/digits_fedavg", "--config", overlay]
    command += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(recipe_root().parent), os.environ["PYTHONPATH"]])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 2, result.stderr
    assert "federated recipes scale by trainer.devices and trainer.num_nodes alone" in result.stderr


def test_options_of_the_strategy_are_reached_from_the_command_line():
    strategy = "--trainer.strategy.init_args"
    main(["fit", "--config", "fedopt/digits_fedavg", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false",
          "--trainer.callbacks=null", f"{strategy}.vectorize_clients=null", f"{strategy}.proximal=0.1",
          f"{strategy}.weighting=uniform", f"{strategy}.clip_norm=1.0", f"{strategy}.noise_multiplier=0.1",
          f"{strategy}.delta=1.0e-5", f"{strategy}.buffers=keep", f"{strategy}.compression=lightning_iclr.fedopt.TopK",
          f"{strategy}.compression.fraction=0.5", f"{strategy}.personal=[net.head.*]",
          "--data.max_local_steps=lightning_iclr.fedopt.Stragglers", "--data.max_local_steps.probability=0.5",
          "--data.client_dropout=0.2"])  # fmt: skip
