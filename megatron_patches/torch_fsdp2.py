"""Lets torch's FSDP2 (`--use-torch-fsdp2`) train and resume a model that has float32 parameters among 16-bit ones.

FSDP2 shards a layer's parameters as one flat tensor, which has one type. A layer's float32 parameters, such as the
decay rates of a recurrence, become a module of their own, which FSDP2 shards apart. A layer says which parameters these
are by a method `names_sharded_apart`.

A checkpoint is written from the shards and read into the shards, and Megatron then leaves out the loading of all else,
the optimizer's number of steps too. Here loading takes the usual way, with the shards as what is loaded.
"""

import torch
from torch.distributed.tensor import DTensor

from megatron_patches.patch import Patch, wrap

APART = "sharded_apart"
"""Name of the module that holds the parameters of another module that are sharded apart."""


class ShardedApart(torch.nn.Module):
    """Parameters of another module. A call returns them by name, whole on every rank."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self) -> dict[str, torch.Tensor]:
        return {name: parameter.clone() for name, parameter in self.named_parameters()}


def hold_apart(module: torch.nn.Module, names: list[str]) -> ShardedApart:
    """Moves parameters of a module to a module of their own. While the module's forward pass runs, the names stand for
    the whole parameters, as before.
    """
    apart = ShardedApart({name: module._parameters.pop(name) for name in names})
    module.add_module(APART, apart)

    def gather(module, inputs):
        vars(module).update(module.get_submodule(APART)())

    def drop(module, inputs, outputs):
        for name in names:
            vars(module).pop(name, None)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(drop, always_call=True)
    return apart


def _shard_apart(init, wrapper, config, ddp_config, module, *args, process_group=None, **kwargs):
    from megatron.core import parallel_state
    from torch.distributed.fsdp import fully_shard

    group = process_group or parallel_state.get_data_parallel_group(with_context_parallel=True)
    for layer in list(module.modules()):
        names = layer.names_sharded_apart() if hasattr(layer, "names_sharded_apart") else []
        if not names:
            continue
        apart = hold_apart(layer, names)
        marks = {name: dict(vars(parameter)) for name, parameter in apart.named_parameters()}
        mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cuda")
        fully_shard(apart, mesh=mesh, reshard_after_forward=getattr(ddp_config, "reshard_after_forward", True))
        for name, parameter in apart.named_parameters():  # Megatron's marks, which FSDP2's parameters do not take over
            vars(parameter).update(marks[name])
    return init(wrapper, config, ddp_config, module, *args, process_group=process_group, **kwargs)


def _gradients_of_float32_parameters(copy, optimizer):
    """Gives float32 parameters' gradients the name that DistributedDataParallel gives them."""
    for group in optimizer.fp32_from_fp32_groups:
        for parameter in group:
            if isinstance(parameter, DTensor):
                parameter.main_grad = parameter.grad
    return copy(optimizer)


def _sharded_like(parameter, value):
    """A shard that was loaded, as a tensor that is sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter._local_tensor.shape:
        return value
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _load_model(load, wrapper, state_dict, strict=True):
    """The wrapper's own `load_state_dict` does nothing."""
    model = wrapper.module
    while hasattr(model, "module"):  # Float16Module
        model = model.module
    places = dict(model.named_parameters())
    rest = dict(state_dict)
    with torch.no_grad():
        for name, parameter in places.items():
            loaded = rest.pop(name.replace(f".{APART}.", "."), None)
            if loaded is not None:
                parameter.copy_(_sharded_like(parameter, loaded))
    if rest:
        model.load_state_dict(rest, strict=False)


def _load_optimizer(load, optimizer, state_dict):
    """Megatron's float16 and float32 optimizers, whose parameters are sharded."""
    if optimizer.is_stub_optimizer:
        return load(optimizer, state_dict)
    of_parameters = state_dict.get("optimizer", state_dict)  # Megatron's float32 optimizer has no entry of this name
    parameters = [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
    for place, state in of_parameters["state"].items():
        if isinstance(place, int):  # "common_step" is beside the parameters' places
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = _sharded_like(parameters[place], value)
    for group, copies in zip(
        getattr(optimizer, "fp32_from_float16_groups", []), state_dict.get("fp32_from_fp16_params", []), strict=False
    ):
        copies[:] = [_sharded_like(parameter, copy) for parameter, copy in zip(group, copies, strict=True)]
    return load(optimizer, state_dict)


def _load_everything(load, *args, skip_load_to_model_and_opt=False, **kwargs):
    return load(*args, **kwargs)


_OPTIMIZER = "megatron.core.optimizer.optimizer"
_FLOAT16 = "Float16OptimizerWithFloat16Params"
_WRAPPER = "megatron.core.distributed.torch_fully_sharded_data_parallel"

PATCH = Patch(
    name="torch-fsdp2",
    reason="torch's FSDP2 takes parameters of one type in a layer, and Megatron's loading for FSDP2 leaves out the "
    "optimizer's number of steps",
    removed_when="TorchFullyShardedDataParallel shards each type apart, and load_checkpoint loads the optimizer",
    targets=(
        wrap(_WRAPPER, "TorchFullyShardedDataParallel.__init__", _shard_apart),
        wrap(_WRAPPER, "TorchFullyShardedDataParallel.load_state_dict", _load_model),
        wrap(_OPTIMIZER, f"{_FLOAT16}._copy_model_grads_to_main_grads", _gradients_of_float32_parameters),
        wrap(_OPTIMIZER, f"{_FLOAT16}.load_state_dict", _load_optimizer),
        wrap(_OPTIMIZER, "FP32Optimizer.load_state_dict", _load_optimizer),
        wrap("megatron.training.checkpointing", "load_checkpoint", _load_everything),
    ),
)
