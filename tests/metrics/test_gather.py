"""Exchange between processes."""

import pytest
import torch
import torch.multiprocessing

from anomalib_decad.metrics.gather import gather


def _gather(rank, address, queue):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    queue.put((rank, gather({"rank": rank, "values": [rank] * 2})))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_alone_it_is_the_value_itself():
    value = object()
    assert gather(value) == [value]


@pytest.mark.slow
def test_each_process_gets_the_values_of_all_in_order(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    torch.multiprocessing.spawn(_gather, args=(f"file://{tmp_path / 'rendezvous'}", queue), nprocs=2)
    expected = [{"rank": 0, "values": [0, 0]}, {"rank": 1, "values": [1, 1]}]
    assert [queue.get()[1] for _ in range(2)] == [expected, expected]
