"""Adam as Transformer Engine and Apex lay it out, computed by torch."""

import torch
from torch.optim.adam import adam


class FusedAdam(torch.optim.Optimizer):
    """Adam whose step count is a number in the parameter group, and whose only state per parameter is two moments.

    Megatron's distributed optimizer expects this layout, the layout of Transformer Engine's and Apex's FusedAdam, and
    cannot load a checkpoint of torch's own Adam, whose step count is a tensor in every parameter's state. A checkpoint
    written through this class has the same entries as a checkpoint written on a GPU.

    adam_w_mode: decoupled weight decay.
    capturable: Megatron passes this argument. ValueError for True: a CPU has no CUDA graph to capture the step in.
    """

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True, capturable=False):
        if capturable:
            raise ValueError("--optimizer-cuda-graph needs a GPU, and this machine has none: leave the option out")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Updates every parameter that has a gradient. `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            steps_before = group.get("step", 0)
            group["step"] = steps_before + 1
            states = [self._moments(param) for param in params]
            beta1, beta2 = group["betas"]
            adam(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(steps_before)) for _ in params],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )

    def _moments(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
