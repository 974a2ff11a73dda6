"""An optimizer that makes states of a parameter's shape, as Transformer Engine's FusedAdam does, gets shards."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megatron_patches.optimizer_shards import _shard_states


class WholeStates(torch.optim.SGD):
    def _initialize_state(self, param, state_name, zero_buffer, store_param_remainders=False):
        state = torch.empty(param.shape, dtype=torch.float32, device=param.device)
        self.state[param][state_name] = state.zero_() if zero_buffer else state


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapped", [False, True])
def test_states_are_of_the_parameters_kind(mesh, wrapped):
    sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2, dtype=torch.bfloat16), mesh, [Shard(0)]))
    whole = torch.nn.Parameter(torch.ones(3))
    optimizer = WholeStates([sharded, whole], lr=0.1)
    found = SimpleNamespace(optimizer=optimizer) if wrapped else (optimizer, None)
    assert _shard_states(lambda: found) is found
    for parameter in (sharded, whole):
        optimizer._initialize_state(parameter, "exp_avg", zero_buffer=True)
        state = optimizer.state[parameter]["exp_avg"]
        assert isinstance(state, DTensor) == isinstance(parameter, DTensor)
        assert state.shape == parameter.shape and state.dtype == torch.float32
    state = optimizer.state[sharded]["exp_avg"]
    assert state.placements == sharded.placements and not state.to_local().any()


def test_other_optimizers_stay_as_they_are():
    found = SimpleNamespace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    assert _shard_states(lambda: found) is found
    assert _shard_states(lambda: SimpleNamespace(optimizer=None)).optimizer is None
