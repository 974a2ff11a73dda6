import pytest
import torch


@pytest.fixture(scope="module")
def megatron():
    """Megatron's process groups for a world of one process, on the GPU or the CPU; undone after the module's tests."""
    from megatron_patches import cpu

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        cpu.apply()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with pytest.MonkeyPatch.context() as environment:  # a script of a later test would take the addresses for its own
        environment.setenv("MASTER_ADDR", "127.0.0.1")
        environment.setenv("MASTER_PORT", "0")  # any free port; no other process connects to it
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    if not on_gpu:
        cpu.undo()
