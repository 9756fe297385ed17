"""Flower's simulation of the digits' federation, for `fedopt.py flower`: the same clients, network, rates and server.

It is written as Flower's own guides write such an app, and given what helps it: rows that are in memory in the client's
process, no evaluation, and one actor a core. Needs the extra ``flower``. Run it in a process of its own, as that does:
Ray does not start beside a Trainer that has run.

    python benchmarks/flower_simulation.py COHORT ROUNDS    # prints seconds a round, without the first two
"""

import json
import logging
import os
import sys
import time
from itertools import pairwise
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedYogi
from flwr.simulation import run_simulation
from torch import Tensor, nn
from torch.nn import functional as F


def flower_rounds(
    net: nn.Module, images: Tensor, labels: Tensor, partition: list[np.ndarray], cohort: int, rounds: int
) -> list[float]:
    """Return wall-clock seconds of each round but the first two, which pay for the start of the actors."""
    shares = [(images[torch.from_numpy(rows)], labels[torch.from_numpy(rows)]) for rows in partition]
    client = ClientApp()

    @client.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        torch.set_num_threads(1)
        own_images, own_labels = shares[context.node_config["partition-id"]]
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for rows in torch.randperm(len(own_labels)).split(5):
            optimizer.zero_grad()
            F.cross_entropy(net(own_images[rows]), own_labels[rows]).backward()
            optimizer.step()
        records = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(own_labels)})}
        return Message(content=RecordDict(records), reply_to=message)

    ends: list[float] = []
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        strategy = FedYogi(
            fraction_train=cohort / len(partition), fraction_evaluate=0.0, min_available_nodes=len(partition), eta=0.03
        )
        arrays = ArrayRecord(net.state_dict())
        strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=lambda *_: ends.append(time.perf_counter()))

    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server,
        client,
        num_supernodes=len(partition),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}},
    )
    return [after - before for before, after in pairwise(ends)][2:]


if __name__ == "__main__":
    from fedopt import Federation

    own_cohort, own_rounds = map(int, sys.argv[1:])
    federation = Federation(own_cohort)
    rows = [np.asarray(own) for own in federation.partition]
    print(json.dumps(flower_rounds(federation.module().net, *federation.tensors(), rows, own_cohort, own_rounds)))
