"""ActNorm in a data-parallel run of two processes."""

import pytest
import torch
import torch.multiprocessing

from anomalib_decad.components import InvertibleNetwork, InvertibleOptions


def _initialize(rank, address, queue):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)  # the same weights, as data parallelism has it
    network = InvertibleNetwork(6, InvertibleOptions(num_blocks=1, num_units=1, hidden_dim=4)).train()
    torch.manual_seed(rank + 1)  # but other data
    network.initialize(torch.randn(50 + 50 * rank, 6) * (rank + 1) + rank)
    queue.put((rank, network.norm_scale.tolist(), network.norm_bias.tolist(), bool(network.initialized)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_initialize_alike_from_their_batches_together(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    address = f"file://{tmp_path / 'rendezvous'}"
    torch.multiprocessing.spawn(_initialize, args=(address, queue), nprocs=2)
    (_, *first), (_, *second) = sorted(queue.get() for _ in range(2))
    assert first == second
    assert first[2] is True
