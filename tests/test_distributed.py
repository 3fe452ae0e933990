"""A model under PyTorch's own data parallelism, in two processes with half a batch each: it learns what it learns in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import next_tokens, random_ids, random_model

IN_EACH = """
import sys
sys.path.insert(0, "tests")
import torch
import torch.distributed as dist
from test_distributed import batch, losses
from tiny_models import random_model
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

way, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
model = random_model(num_nextn_predict_layers=0).train()
ids, labels = (x.tensor_split(2)[rank] for x in batch(model))
if way == "ddp":
    wrapped = DistributedDataParallel(model)
    found = losses(model, lambda: torch.nn.functional.cross_entropy(wrapped(ids).flatten(0, 1), labels.flatten()))
else:
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    register_fsdp_forward_method(model, "loss")
    found = losses(model, lambda: model.loss(ids, labels))
both = torch.tensor(found)
dist.all_reduce(both)
print(*(both / 2).tolist())
dist.destroy_process_group()
"""


def batch(model) -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(model, 4, 9)
    labels = next_tokens(ids)
    labels[:, -1] = 3  # so that both halves have as many
    return ids, labels


def losses(model, loss_of) -> list[float]:
    """Of three steps of AdamW, each before its update."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(way: str, tmp_path: Path):
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-c", IN_EACH, way]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], cwd=Path(__file__).parents[1], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    model = random_model(num_nextn_predict_layers=0).train()
    ids, labels = batch(model)
    expected = losses(model, lambda: model.loss(ids, labels))
    for out, _ in said:
        assert [float(word) for word in out.split()] == pytest.approx(expected, rel=1e-5)
