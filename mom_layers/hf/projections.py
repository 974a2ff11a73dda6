"""The projections of the memories, under the parameter names of the Hugging Face format, for two kinds of callers.

The kernels read the projections of all memories as one matrix. Adapters, hooks and offloading act on modules that are
called. So a layer reads the one matrix where every module is as this file makes it, and calls the modules otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F


class MemoryLinear(nn.Module):
    """The linear map of one memory: the module ``k_proj.2``, whose weight is `k_proj.2.weight`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class _JoinedWeight:
    """The weights of all memories as one matrix [M O, D] that can be read, and written through ``data``."""

    def __init__(self, parts: list[nn.Parameter]):
        self._parts = parts

    @property
    def data(self) -> torch.Tensor:
        return torch.cat([part.data for part in self._parts])

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        for part, new in zip(self._parts, value.split([part.shape[0] for part in self._parts]), strict=True):
            part.data = new.clone()

    def __getattr__(self, name: str):
        return getattr(torch.cat(self._parts), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def whole(x):
            return torch.cat(x._parts) if isinstance(x, cls) else x

        return function(*map(whole, args), **{name: whole(x) for name, x in (kwargs or {}).items()})


class MemoryProjections(nn.Linear):
    """The linear maps of all routed memories to one piece of a projection (`k_proj`: keys), as one map [D] -> [M O].

    An adapter treats the module as one linear layer, whether the adapter's configuration names ``k_proj`` or all
    linear layers. The parameters are the memories' own, `k_proj.0.weight` and so on.
    """

    def __init__(self, in_features: int, out_features: int, num_memories: int):
        nn.Module.__init__(self)  # the parent's constructor would make a weight
        self.in_features, self.out_features = in_features, num_memories * out_features
        self.register_parameter("bias", None)
        for memory in range(num_memories):
            self.add_module(str(memory), MemoryLinear(in_features, out_features))

    @property
    def weight(self) -> _JoinedWeight:
        return _JoinedWeight([linear.weight for linear in self])

    def __iter__(self) -> Iterator[MemoryLinear]:
        return iter(self._modules.values())

    def __getitem__(self, memory: int) -> MemoryLinear:
        return self._modules[str(memory)]

    def __len__(self) -> int:
        return len(self._modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D]. Returns [..., M O], memory after memory."""
        return torch.cat([linear(x) for linear in self], dim=-1)


class ShortConvolution(nn.Module):
    """The filters of a depthwise convolution. A call returns the filters [C, W], which the kernels apply to rows.

    The class does not inherit from PyTorch's convolution, so that a library of adapters refuses the module by name.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform, as PyTorch draws a depthwise filter."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, like: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight.squeeze(1)


class NoConvolution(nn.Module):
    """Stands for the filters where there is no convolution. A call returns one fixed tap of 1, [C, 1], in the type and
    on the device of ``like``."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_ones(self.channels, 1)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is what the layer made, so that reading its weight says what calling the module computes.

    An adapter replaces the module, a hook is registered, offloading sets another ``forward``, and quantisation replaces
    the module or its weight.
    """
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and "forward" not in module.__dict__
    )


class _Together:
    """Holds the matrix in which the weights of a layer lie one after another. A copied layer starts with no matrix."""

    def __init__(self):
        self.matrix: torch.Tensor | None = None

    def __deepcopy__(self, memo):
        return _Together()

    def __reduce__(self):
        return _Together, ()


class OneMatrix:
    """Reads weights [O_i, D] as one matrix [sum of O_i, D], without a copy where no gradient is needed."""

    def __init__(self):
        self._together = _Together()

    def read(self, weights: list[torch.Tensor]) -> torch.Tensor:
        """The weights, one after another.

        Where gradients are needed, the result is a copy, and its gradient reaches the weights. Elsewhere the first call
        moves the weights' values so that the weights lie one after another, each with a storage of its own, and later
        calls copy nothing.
        """
        needs_gradient = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if needs_gradient or torch.compiler.is_compiling() or _others_rely_on_the_place_of(weights):
            return torch.cat(weights)
        matrix = self._together.matrix
        if matrix is None or not _lie_in(matrix, weights):
            # The matrix must be of the parameters' own kind: an inference tensor could never be trained again.
            with torch.inference_mode(weights[0].is_inference()), torch.no_grad():
                matrix = torch.cat([weight.detach() for weight in weights])
                for weight, part in zip(weights, matrix.split([w.shape[0] for w in weights]), strict=True):
                    # A storage of its own: safetensors refuses to save a tensor that is a part of a larger storage.
                    weight.data = torch.from_dlpack(part)
            self._together.matrix = matrix
        return matrix


def _lie_in(matrix: torch.Tensor, weights: list[torch.Tensor]) -> bool:
    """Whether the weights are the parts of the matrix, one after another."""
    end = matrix.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.dtype != matrix.dtype or not weight.is_contiguous():
            return False
        end += weight.nbytes
    return end == matrix.data_ptr() + matrix.nbytes and weights[0].is_inference() == matrix.is_inference()


def _others_rely_on_the_place_of(weights: list[torch.Tensor]) -> bool:
    """Whether FSDP or ZeRO, which need several processes, may hold the weights."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed or any(type(weight) is not nn.Parameter for weight in weights)
