"""Lets Megatron train on a machine with no GPU, over gloo: for tests and demonstrations.

Megatron names CUDA in a few hundred places. `torch.cuda.is_available()` stays false. The patches change what torch
returns for a CUDA device, stream or generator, and the few places where Megatron stops without a GPU. `PATCHES` lists
the patches, each with its reason.

An entry script calls `apply()` before the script parses Megatron's arguments. `apply()` also sets Megatron's defaults
to the arguments that a run without a GPU needs.
"""

import collections
import contextlib
import time
from types import SimpleNamespace

import torch
import torch.utils._device

from megatron_patches import cpu_gated_delta_net, float32_parameters, gloo
from megatron_patches.adam import FusedAdam
from megatron_patches.patch import Patch, Target, apply_all, replace, undo_all, wrap

# Defaults of Megatron's parser, by argparse destination; the command line still wins. The `args_defaults` of
# parse_and_validate_args would not do: they count only for arguments whose default in Megatron is None.
CPU_ARGUMENTS = {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "transformer_impl": "local",
    "num_workers": 0,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
}

_CPU = torch.device("cpu")

_TENSOR_FACTORIES = (
    "arange as_tensor empty empty_like full full_like linspace ones ones_like rand rand_like randint randn randn_like "
    "tensor zeros zeros_like"
).split()


def _set_defaults(add_megatron_arguments, parser):
    parser = add_megatron_arguments(parser)
    parser.set_defaults(**CPU_ARGUMENTS)
    return parser


def _is_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _on_cpu(factory, *args, **kwargs):
    """Calls a function that makes a tensor, with "cpu" in place of a CUDA device, and in pageable memory."""
    if _is_cuda(kwargs.get("device")):
        kwargs["device"] = _CPU
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    return factory(*args, **kwargs)


def _with_own_generator(init, loader, *args, **kwargs):
    """DataLoader.__init__ with a generator of the loader's own, for its shuffling and its workers' seeds.

    A loader without one draws a seed from torch's CPU generator at every start. On a GPU dropout has another generator.
    On a CPU both are one, and a resumed run, which starts its loaders in another step, would draw other dropout masks.
    """
    if kwargs.get("generator") is None:
        kwargs["generator"] = torch.Generator().manual_seed(torch.initial_seed())
    return _on_cpu(init, loader, *args, **kwargs)


def _mesh_on_cpu(build, group, device_type, *args, **kwargs):
    """DeviceMesh.from_group with "cpu" in place of "cuda"."""
    return build(group, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _same_tensor(original, tensor, *args, **kwargs):
    return tensor


def _nothing(original, *args, **kwargs) -> None:
    return None


class NoStream:
    """Stands for a CUDA stream on a machine that runs every operation in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or NoEvent()

    def synchronize(self) -> None:
        pass


class NoEvent:
    """Stands for a CUDA event; the event happens at the moment of `record`."""

    def __init__(self, *args, **kwargs):
        self._seconds = 0.0

    def record(self, stream=None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "NoEvent") -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1e3


_ONLY_STREAM = NoStream()


def _seed_cpu(original, seed: int) -> None:
    # torch.manual_seed would queue the seed for CUDA as well.
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def _fork(tracker, name: str = "model-parallel-rng"):
    """CudaRNGStatesTracker.fork on the CPU's generator, without Megatron's warning that this generator has moved."""
    if name not in tracker.states_:
        raise ValueError(f"there is no random state {name!r}: expected one of {sorted(tracker.states_)}")
    outer_name, outer_state = tracker._current_state_name, torch.get_rng_state()
    if outer_name in tracker.states_:
        tracker.states_[outer_name] = outer_state
    torch.set_rng_state(tracker.states_[name])
    tracker._current_state_name = name
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(tracker.states_.get(outer_name, outer_state))
        tracker._current_state_name = outer_name


def _checkpoint_worker(*args, **kwargs) -> None:
    """Main function of the process that writes asynchronous checkpoints. No patch is applied in the new process yet.

    multiprocessing finds the function by name, which a closure made by `wrap` does not have.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    _WORKER.undo()
    apply_all((_DEVICE, _STREAMS))
    PersistentAsyncCaller.async_loop(*args, **kwargs)


def _without_fp8(init, checkpoint, *args, **kwargs) -> None:
    init(checkpoint, *args, **kwargs)
    checkpoint.fp8 = False


def _type_name_on_cuda(original, tensor, *args, **kwargs):
    name = original(tensor, *args, **kwargs)
    if name in ("torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor"):
        return name.replace("torch.", "torch.cuda.")
    return name


def _torch_norm(original):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return WrappedTorchNorm


_DEVICE = Patch(
    name="cpu-device",
    reason="with no device Megatron sets up neither process groups nor seeds, and it asks for the device's version",
    removed_when="megatron.training starts with --distributed-backend gloo",
    targets=(
        wrap("torch.cuda", "device_count", lambda original: 1),
        wrap("torch.cuda", "set_device", _nothing),
        wrap(
            "torch.cuda",
            "get_device_properties",
            # The newest compute capability that Megatron compares with, so that no check for an old device fails.
            lambda original, device=None: SimpleNamespace(name="cpu", major=10, minor=0, total_memory=0),
        ),
    ),
)

_STREAMS = Patch(
    name="cpu-streams",
    reason="timers, pipelines and checkpoints wait for CUDA streams",
    removed_when="Megatron waits through torch.accelerator, which accepts a machine without one",
    targets=(
        replace("torch.cuda", "Stream", NoStream),
        replace("torch.cuda", "Event", NoEvent),
        wrap("torch.cuda", "stream", lambda original, stream: contextlib.nullcontext()),
        wrap("torch.cuda", "set_stream", _nothing),
        wrap("torch.cuda", "current_stream", lambda original, device=None: _ONLY_STREAM),
        wrap("torch.cuda", "default_stream", lambda original, device=None: _ONLY_STREAM),
        wrap("torch.cuda", "synchronize", _nothing),
        wrap("torch.cuda", "is_current_stream_capturing", lambda original: False),
        wrap("torch", "Tensor.record_stream", _nothing),
    ),
)

_WORKER = Patch(
    name="cpu-checkpoint-worker",
    reason="the persistent checkpoint worker divides by the number of GPUs",
    removed_when="the worker sets no device on a machine without GPUs",
    targets=(
        replace(
            "megatron.core.dist_checkpointing.strategies.async_utils",
            "PersistentAsyncCaller.async_loop",
            _checkpoint_worker,
        ),
    ),
)

PATCHES = (
    float32_parameters.PATCH,
    _DEVICE,
    Patch(
        name="cpu-start",
        reason="initialize_megatron insists on CUDA",
        removed_when="pretrain passes allow_no_cuda on",
        targets=(
            wrap(
                "megatron.training.initialize",
                "initialize_megatron",
                lambda original, *args, **kwargs: original(*args, **{**kwargs, "allow_no_cuda": True}),
            ),
        ),
    ),
    Patch(
        name="cpu-arguments",
        reason="the defaults of Megatron's arguments choose NCCL, Transformer Engine and fused kernels",
        removed_when="the defaults depend on the device",
        targets=(wrap("megatron.training.arguments", "add_megatron_arguments", _set_defaults),),
    ),
    Patch(
        name="cpu-tensors",
        reason="tensors are made with device='cuda' or torch.cuda.current_device() throughout",
        removed_when="Megatron makes tensors on one device that can be set",
        targets=(
            wrap("torch.cuda", "current_device", lambda original: _CPU),
            *(wrap("torch", name, _on_cpu) for name in _TENSOR_FACTORIES),
            wrap("torch.distributed.device_mesh", "DeviceMesh.from_group", _mesh_on_cpu),
            wrap("torch", "Tensor.cuda", _same_tensor),
            wrap("torch", "Tensor.pin_memory", _same_tensor),
        ),
    ),
    Patch(
        name="cpu-eager",
        reason="functions decorated with torch.compile would be compiled for the CPU, which takes longer than they run",
        removed_when="--disable-jit-fuser works on functions that were decorated earlier",
        targets=(
            replace("torch._dynamo.config", "disable", True),
            # Uncompiled functions need no warm-up. The warm-up would also draw random numbers before initialisation,
            # and the number of draws depends on the tensor-parallel layout.
            wrap("megatron.training.initialize", "_warmup_jit_function", _nothing),
        ),
    ),
    Patch(
        name="cpu-random",
        reason="dropout, initialisation and recomputation save and fork the state of CUDA's generator, which data "
        "loaders do not draw from",
        removed_when="the RNG tracker works on the generator of the device in use",
        targets=(
            wrap("torch.cuda", "manual_seed", _seed_cpu),
            wrap("torch.cuda", "get_rng_state", lambda original, device=None: torch.get_rng_state()),
            wrap("torch.cuda.random", "get_rng_state", lambda original, device=None: torch.get_rng_state()),
            wrap("torch.cuda", "set_rng_state", lambda original, state, device=None: torch.set_rng_state(state)),
            wrap(
                "megatron.core.tensor_parallel.random",
                "_set_cuda_rng_state",
                lambda original, state, device=-1, graph_safe=False: torch.set_rng_state(state),
            ),
            replace("megatron.core.tensor_parallel.random", "CudaRNGStatesTracker.fork", _fork),
            wrap("torch.utils.data", "DataLoader.__init__", _with_own_generator),
        ),
    ),
    Patch(
        name="cpu-transformer-engine",
        reason="the router's product and a plain model's last norm use Transformer Engine wherever it is installed",
        removed_when="the router and the last norm read --transformer-impl",
        targets=(
            replace("megatron.core.transformer.moe.moe_utils", "te_general_gemm", None),
            Target("megatron.core.transformer.transformer_block", "LayerNormImpl", _torch_norm),
        ),
    ),
    Patch(
        name="cpu-recompute",
        reason="--recompute-modules layernorm and its like ask Transformer Engine whether a run is in fp8, by a name "
        "that is not defined where it is not installed",
        removed_when="CheckpointWithoutOutput asks for fp8 only where Transformer Engine is installed",
        targets=(wrap("megatron.core.tensor_parallel.random", "CheckpointWithoutOutput.__init__", _without_fp8),),
    ),
    _STREAMS,
    _WORKER,
    Patch(
        name="cpu-collectives",
        reason="gloo takes the split sizes of all_to_all as numbers, and Megatron converts only tensors on a GPU",
        removed_when="maybe_move_tensor_to_cpu converts tensors that are on the CPU already",
        targets=(wrap("torch.distributed", "all_to_all_single", gloo.split_sizes_as_numbers),),
    ),
    Patch(
        name="cpu-lengths",
        reason="experts whose tensor-parallel ranks hold different numbers of tokens gather and scatter parts of "
        "different lengths, which gloo refuses",
        removed_when="gloo gathers and scatters parts of different lengths",
        targets=(
            wrap("torch.distributed", "all_gather", gloo.gather_different_lengths),
            wrap("torch.distributed", "reduce_scatter", gloo.scatter_different_lengths),
        ),
    ),
    Patch(
        name="cpu-optimizer-types",
        reason="optimizers and gradient clipping compare Tensor.type() with 'torch.cuda.FloatTensor' and the like",
        removed_when="optimizers and gradient clipping compare dtype",
        targets=(wrap("torch", "Tensor.type", _type_name_on_cuda),),
    ),
    Patch(
        name="cpu-adam",
        reason="without Transformer Engine or Apex the distributed optimizer cannot load its own checkpoint",
        removed_when="the distributed optimizer's load_state_dict works with torch.optim.AdamW",
        targets=(
            replace("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", False),
            replace("megatron.core.optimizer", "Adam", FusedAdam),
            replace("megatron.core.optimizer.distrib_optimizer", "Adam", FusedAdam),
            replace("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", True),
            replace("megatron.core.optimizer.distrib_optimizer", "USING_APEX_OPTIMIZER", True),
        ),
    ),
    cpu_gated_delta_net.PATCH,
    Patch(
        name="cpu-memory-report",
        reason="training_log reads keys of torch.cuda.memory_stats(), which is empty without a GPU",
        removed_when="training_log uses memory_stats().get(key, 0)",
        targets=(wrap("torch.cuda", "memory_stats", lambda original, device=None: collections.Counter()),),
    ),
)


def apply() -> None:
    """Applies PATCHES. A second call does nothing.

    Raises RuntimeError on a machine with a GPU, and PatchError when a patch does not fit the installed Megatron.
    Neither error leaves a patch applied.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            f"megatron_patches.cpu is for machines without a GPU, and this machine has {torch.cuda.get_device_name()}: "
            "train on the GPU, or hide it with CUDA_VISIBLE_DEVICES=''"
        )
    # `with torch.device(...)` finds torch's factories in a list that torch makes at its first use. The list must hold
    # the originals, which the replacements call.
    torch.utils._device._device_constructors()
    apply_all(PATCHES)


def undo() -> None:
    """Undoes every patch of PATCHES."""
    undo_all(PATCHES)
