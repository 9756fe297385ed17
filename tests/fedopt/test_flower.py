"""The Flower bridge equals the simulation: in this process with a grid of our own, and over loopback with Flower's."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, Subset

from lightning_iclr.fedopt.compression import TopK
from lightning_iclr.fedopt.flower import FedOptFlower, flower_server_app, lightning_client_app
from lightning_iclr.fedopt.loader import FederatedLoader, Stragglers
from lightning_iclr.fedopt.optim import FedYogi
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.fedopt.federation import SIZES, Module, Validated, loader, partition, rows, trainer

with warnings.catch_warnings():  # flwr's typer imports what the newest click deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
    from flwr.serverapp import ServerApp, strategy
    from flwr.supercore.task_identity import TaskIdentity

SIMULATION = {"num_clients": len(SIZES), "clients_per_round": 3, "seed": 5}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(autouse=True)
def _task(monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Nodes in this process, each with a ClientApp; messages go through Flower's serialisation."""

    def __init__(self, app, numbers=tuple(range(6)), broken=()):
        self.app, self.broken, self.trained, self.clients = app, broken, [], []
        self.contexts = {}
        for place, number in enumerate(numbers):
            config = {} if number is None else {"partition-id": number}
            self.contexts[100 + place] = Context(1, 100 + place, config, RecordDict(), {})

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, timeout=None):
        return [self.reply(message) for message in messages][::-1]  # the first to be asked is the last to answer

    def reply(self, message):
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        message.content = recorddict_from_proto(recorddict_to_proto(message.content))
        if kind == "train":
            self.trained.append(node)
            self.clients.append(message.content["config"].get("client"))
            if node in self.broken:
                return Message(Error(0, "broken on purpose"), reply_to=message)
        answer = self.app(message, self.contexts[node])
        answer.content = recorddict_from_proto(recorddict_to_proto(answer.content))
        return answer


def yogi(params):
    return FedYogi(params, lr=0.05)


def server_schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def client_app(module=Module, trainer_kwargs=None, **options):
    kwargs = {"accelerator": "cpu", **(trainer_kwargs or {})}
    return lightning_client_app(lambda context: module(), lambda context: loader(**options), kwargs)


def federate(app_or_grid, options=None, rounds=3, module=Module, **arguments):
    grid = app_or_grid if isinstance(app_or_grid, Grid) else Grid(app_or_grid)
    flower = FedOptFlower(module(), FedOptStrategy(yogi, **(options or {})), **{**SIMULATION, **arguments})
    flower.result = flower.start(grid, num_rounds=rounds)
    return flower


def simulate(options=None, rounds=3, module=Module, ckpt_path=None, trainer_kwargs=None, **data):
    own, strategy = module(), FedOptStrategy(yogi, **(options or {}))
    run = trainer(strategy, rounds, **(trainer_kwargs or {}))
    run.fit(own, loader(**data), ckpt_path=ckpt_path)
    run.save_checkpoint("simulation.ckpt")
    return run, torch.load("simulation.ckpt", weights_only=True)


def assert_equal(left, right, atol=1e-6):
    torch.testing.assert_close(dict(left), dict(right), rtol=0, atol=atol)


@pytest.mark.parametrize("schedule", ["epoch", "step", None])
def test_rounds_on_flower_equal_the_simulation(tmp_path, schedule):
    def module():
        return Module(schedule)

    data = {"local_epochs": 2, "max_local_steps": Stragglers(0.5, local_steps=2), "client_dropout": 0.2}
    options = {"server_lr_scheduler": server_schedule}
    run, expected = simulate(options, module=module, **data)
    flower = federate(
        client_app(module, **data), options, module=module, dirpath=tmp_path / "flower", client_dropout=0.2
    )
    found = torch.load(tmp_path / "flower" / "last.ckpt", weights_only=True)
    assert_equal(found["state_dict"], expected["state_dict"])
    loops = [checkpoint["loops"]["fit_loop"] for checkpoint in (found, expected)]
    for loop in loops:
        loop.pop("epoch_loop.scheduler_progress")  # a count that nothing reads; clients step their own
    assert loops[0] == loops[1]
    for key in ("epoch", "global_step", "lr_schedulers", "optimizer_states", "callbacks"):
        assert found[key] == expected[key], key
    torch.testing.assert_close(found["fedopt"], expected["fedopt"], rtol=0, atol=1e-6)
    assert_equal(Module.load_from_checkpoint(tmp_path / "flower" / "last.ckpt").state_dict(), expected["state_dict"])
    torch.testing.assert_close(flower.strategy.round_norms, run.strategy.round_norms, rtol=0, atol=1e-6)
    for name, value in run.strategy.round_metrics.items():
        torch.testing.assert_close(flower.strategy.round_metrics[name], value, rtol=0, atol=1e-6)
        assert flower.result.train_metrics_clientapp[3][name] == pytest.approx(float(value), abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"proximal": 0.5},
        {"weighting": "uniform", "clip_norm": 0.05},
        {"weighting": "uniform", "clip_norm": 0.05, "noise_multiplier": 0.3, "buffers": "keep"},
        {"weighting": lambda task: task.client + task.steps},
        {"personal": ["net.4.*", "net.1.*"]},
    ],
    ids=["proximal", "clipped", "noise", "callable", "personal"],
)
def test_the_strategys_options_work_on_flower(options):
    _, expected = simulate(options)
    flower = federate(client_app(), options)
    assert_equal(flower.module.state_dict(), expected["state_dict"])


def test_accumulation_and_clipping_in_the_clients_trainer_equal_the_simulation(tmp_path):
    kwargs = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    _, expected = simulate(trainer_kwargs=kwargs)
    flower = federate(client_app(trainer_kwargs={**kwargs, "max_epochs": 9}), dirpath=tmp_path)
    assert_equal(flower.module.state_dict(), expected["state_dict"])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == expected["global_step"]


def test_the_order_in_which_clients_answer_changes_no_bit():
    class Prompt(Grid):
        def send_and_receive(self, messages, timeout=None):
            return super().send_and_receive(messages, timeout)[::-1]

    options = {"clip_norm": 0.05}  # without it float64 adds these updates up exactly
    late, prompt = (federate(grid(client_app()), options, rounds=1, clients_per_round=6) for grid in (Grid, Prompt))
    torch.testing.assert_close(late.strategy.mean_update, prompt.strategy.mean_update, rtol=0, atol=0)


def test_a_client_needs_no_rows_but_its_own():
    def own_rows(context):
        mine = partition()[context.node_config["partition-id"]]
        return FederatedLoader(Subset(rows(), mine), [range(len(mine))], clients_per_round=1, batch_size=3, seed=5)

    _, expected = simulate()
    flower = federate(lightning_client_app(lambda context: Module(), own_rows, {"accelerator": "cpu"}))
    assert_equal(flower.module.state_dict(), expected["state_dict"])


def test_simulation_flower_simulation_equals_one_simulation(tmp_path):
    def half(folder, rounds, ckpt_path=None):
        checkpoint = ModelCheckpoint(dirpath=tmp_path / folder, save_last=True)
        stop = EarlyStopping("train/loss", patience=20)
        run = trainer(
            FedOptStrategy(yogi, server_schedule), rounds, enable_checkpointing=True, callbacks=[checkpoint, stop]
        )
        module = Validated()
        run.fit(module, loader(), DataLoader(rows(), batch_size=8), ckpt_path=ckpt_path)
        return module.state_dict(), run

    expected, _ = half("whole", 6)
    half("parts", 2)
    flower = federate(
        client_app(Validated),
        {"server_lr_scheduler": server_schedule},
        rounds=2,
        module=Validated,
        ckpt_path=tmp_path / "parts" / "last.ckpt",
        dirpath=tmp_path / "flower",
    )
    assert flower.server.round == 4
    handed_over = torch.load(tmp_path / "flower" / "last.ckpt", weights_only=True)
    assert any("EarlyStopping" in name for name in handed_over["callbacks"])
    found, run = half("parts", 6, tmp_path / "flower" / "last.ckpt")
    assert_equal(found, expected)
    assert (run.current_epoch, run.strategy.server.round) == (6, 6)


def test_a_federation_continues_its_own_checkpoint(tmp_path):
    expected = federate(client_app(), rounds=4).module.state_dict()
    federate(client_app(), rounds=1, dirpath=tmp_path)
    again = federate(client_app(), rounds=3, ckpt_path=tmp_path / "last.ckpt")
    assert_equal(again.module.state_dict(), expected, atol=0)


class Poisoned(Module):
    """Client 2's gradient is not a number."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (torch.nan if self.trainer.strategy.slots[batch_idx].task.client == 2 else 1.0)


def test_clients_that_fail_or_diverge_are_left_out():
    _, expected = simulate(module=Poisoned)
    flower = federate(client_app(Poisoned))
    assert_equal(flower.module.state_dict(), expected["state_dict"])
    assert any(loader().plan(index).cohort.count(2) for index in range(3))

    broken = federate(Grid(client_app(), broken=[102]), clients_per_round=6, rounds=1)
    assert broken.strategy.round_metrics["clients"] == 5
    with pytest.warns(UserWarning, match="round 0 leaves the server as it was"):
        start = federate(Grid(client_app(), broken=range(100, 106)), rounds=1)
    assert start.server.skipped_rounds == 1
    assert_equal(start.module.state_dict(), Module().state_dict(), atol=0)


def test_a_reply_of_another_shape_is_left_out(caplog):
    class Other(Grid):
        def reply(self, message):
            answer = super().reply(message)
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 101:
                answer.content["arrays"].pop("net.0.weight")
            return answer

    flower = federate(Other(client_app()), clients_per_round=6, rounds=1)
    assert flower.strategy.round_metrics["clients"] == 5
    assert "Client 1 is left out: net.0.weight must have shape (8, 4), got None" in caplog.text


def test_clients_of_a_cohort_that_are_not_there_are_not_waited_for_in_vain():
    grid = Grid(client_app(), numbers=[0, 1, 3, 5])
    flower = federate(grid, clients_per_round=6, patience=0.05, rounds=1)
    assert grid.trained == [100 + [0, 1, 3, 5].index(c) for c in flower.loader.plan(0).cohort if c in (0, 1, 3, 5)]
    assert flower.strategy.round_metrics["examples"] == SIZES[0] + SIZES[1] + SIZES[3] + SIZES[5]


def test_nodes_without_a_number_are_sampled_and_numbered():
    grid = Grid(client_app(), numbers=[None] * 6)
    flower = federate(grid, clients_per_round=4)
    assert [len(set(grid.trained[i : i + 4])) for i in (0, 4, 8)] == [4, 4, 4]
    assert flower.strategy.round_metrics["examples"] == sum(SIZES[client] for client in grid.clients[8:])
    nodes = set(zip(grid.trained, grid.clients, strict=True))
    assert len(nodes) == len(set(grid.trained)) == len(set(grid.clients))  # each keeps its number


def test_clients_evaluate_the_servers_model():
    def own(context):
        return DataLoader(Subset(rows(), partition()[context.node_config["partition-id"]]), batch_size=50)

    app = lightning_client_app(lambda context: Validated(), lambda context: loader(), {"accelerator": "cpu"}, own)
    flower = federate(app, rounds=2, module=Validated, fraction_evaluate=1.0)
    whole = trainer("auto").validate(flower.module, DataLoader(rows(), batch_size=50), verbose=False)
    found = flower.result.evaluate_metrics_clientapp[2]["val/loss"]
    assert found == pytest.approx(whole[0]["val/loss"], abs=1e-5)


def test_a_strategy_of_flowers_own_trains_the_client_app():
    module = Module(norm=False)
    grid = Grid(client_app(lambda: Module(norm=False)))
    arrays = ArrayRecord({name: value for name, value in module.state_dict().items()})
    result = strategy.FedAvg(fraction_evaluate=0.0).start(grid, arrays, num_rounds=2)
    own, run = Module(norm=False), trainer(FedOptStrategy(), 2)
    run.fit(own, loader(clients_per_round=6))
    assert_equal(result.arrays.to_torch_state_dict(), own.state_dict(), atol=1e-5)


def test_it_is_a_strategy_and_an_app_of_flowers():
    flower = FedOptFlower(Module(), FedOptStrategy(yogi), **SIMULATION)
    assert isinstance(flower, strategy.Strategy)
    app = flower_server_app(lambda context: flower)
    assert isinstance(app, ServerApp)
    app(Grid(client_app()), Context(1, 1, {}, RecordDict(), {"num-server-rounds": 2}))
    assert flower.server.round == 2


def test_bad_arguments_are_refused():
    def build(options=None, **arguments):
        FedOptFlower(Module(), FedOptStrategy(yogi, **(options or {})), **{**SIMULATION, **arguments})

    for options in ({"compression": TopK(0.5)}, {"vectorize_clients": 2}):
        with pytest.raises(ValueError, match="compression and vectorize_clients are of the simulation only"):
            build(options)
    with pytest.raises(ValueError, match=r"fraction_evaluate must be in \[0, 1\], got 2"):
        build(fraction_evaluate=2)
    with pytest.raises(ValueError, match="clients_per_round must lie between 1 and the 6 clients"):
        build(clients_per_round=7)
    with pytest.raises(ValueError, match="must leave out strategy, and devices must be 1"):
        client_app(trainer_kwargs={"devices": 2})
    with pytest.raises(ValueError, match="data_fn must serve client 6, got a loader of 6 clients"):
        federate(Grid(client_app(), numbers=[6]), num_clients=7, clients_per_round=7, patience=0, rounds=1)
    with pytest.raises(ValueError, match=r"module_fn must build a net.0.weight of shape \(8, 4\), got None"):
        federate(client_app(LightningModule), rounds=1)


APP = {
    "pyproject.toml": """
        [project]
        name = "federation"
        version = "1.0.0"
        description = "Two clients of a test"
        license = "Apache-2.0"

        [tool.flwr.app]
        publisher = "test"

        [tool.flwr.app.components]
        clientapp = "client_app:app"
        serverapp = "server_app:app"

        [tool.flwr.app.config]
        num-server-rounds = 2
        folder = ""
    """,
    "client_app.py": """
        from torch.utils.data import Subset

        from lightning_iclr.fedopt.flower import lightning_client_app
        from lightning_iclr.fedopt.loader import FederatedLoader
        from tests.fedopt.federation import Module, partition, rows


        def own_rows(context):
            mine = partition([24, 15])[context.node_config["partition-id"]]
            return FederatedLoader(Subset(rows(), mine), [range(len(mine))], clients_per_round=1, batch_size=4, seed=5)


        app = lightning_client_app(lambda context: Module(), own_rows, {"accelerator": "cpu"})
    """,
    "server_app.py": """
        from lightning_iclr.fedopt.flower import FedOptFlower, flower_server_app
        from lightning_iclr.fedopt.optim import FedYogi
        from lightning_iclr.fedopt.strategy import FedOptStrategy
        from tests.fedopt.federation import Module


        def build(context):
            options = {"num_clients": 2, "clients_per_round": 2, "seed": 5, "dirpath": context.run_config["folder"]}
            return FedOptFlower(Module(), FedOptStrategy(lambda params: FedYogi(params, lr=0.05)), **options)


        app = flower_server_app(build)
    """,
}


class Children:
    """Processes of a test, with their logs; they and all that they start end with the block."""

    def __init__(self, folder, env):
        self.folder, self.env, self.processes = folder, env, {}

    def __enter__(self):
        return self

    def start(self, name, *command):
        with open(self.folder / f"{name}.log", "wb") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        return self.processes[name]

    def wait(self, name, seconds, until=None):
        """Wait until a process ends well, or until something holds while it runs."""
        deadline = time.monotonic() + seconds
        process = self.processes[name]
        while time.monotonic() < deadline:
            if until is not None and until():
                return
            if process.poll() is not None:
                if until is None and process.returncode == 0:
                    return
                break
            time.sleep(0.2)
        how = f"is not done after {seconds} s" if process.poll() is None else f"ended with {process.returncode}"
        pytest.fail(f"{name} {how}\n{self.logs()}")

    def logs(self):
        return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.glob("*.log")))

    def __exit__(self, *error):
        # Flower starts further processes in sessions of their own, so find them while their parents live.
        started = {child for process in self.processes.values() for child in descendants(process.pid)}
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 20
            while any(process.poll() is None for process in self.processes.values()) and time.monotonic() < deadline:
                time.sleep(0.1)
            started = {pid for pid in started if running(pid)}


def descendants(pid):
    """Return a process and all that it has started, by Linux' table of processes."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_real_federation_on_loopback_equals_the_simulation(tmp_path):
    app, home, result = tmp_path / "app", tmp_path / "home", tmp_path / "result"
    for folder in (app, home):
        folder.mkdir()
    for name, text in APP.items():
        (app / name).write_text(textwrap.dedent(text))
    link, *nodes = free_ports(3)
    address = f"127.0.0.1:{link}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    binaries = Path(sys.executable).parent
    root = str(Path(__file__).parents[2])
    env = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], root]),
        "PATH": os.pathsep.join([str(binaries), os.environ["PATH"]]),
    }
    with Children(tmp_path, env) as children:
        offline = "--disable-runtime-dependency-installation"
        at = ("--insecure", "--host", "127.0.0.1", "--port")
        children.start("superlink", binaries / "flower-superlink", offline, *at, str(link))
        children.wait("superlink", 120, until=lambda: listens(link))
        for number, port in enumerate(nodes):
            config = ("--superlink", address, "--node-config", f"partition-id={number}")
            children.start(f"supernode-{number}", binaries / "flower-supernode", *config, *at, str(port))
        children.start("run", binaries / "flwr", "run", app, "here", "--stream", "--run-config", f"folder='{result}'")
        children.wait("run", 900)
        assert (result / "last.ckpt").exists(), children.logs()
        started = {pid for process in children.processes.values() for pid in descendants(process.pid)}
    assert not [pid for pid in started if running(pid)]

    own, simulation = Module(), trainer(FedOptStrategy(yogi), 2)
    simulation.fit(own, FederatedLoader(rows(), partition([24, 15]), clients_per_round=2, batch_size=4, seed=5))
    found = torch.load(result / "last.ckpt", weights_only=True)
    assert (found["fedopt"]["round"], found["global_step"]) == (2, simulation.global_step)
    assert_equal(found["state_dict"], own.state_dict())
    torch.testing.assert_close(found["fedopt"]["optimizer"], simulation.strategy.server.optimizer.state_dict(),
                               rtol=0, atol=1e-6)  # fmt: skip
