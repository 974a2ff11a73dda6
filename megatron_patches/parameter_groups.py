"""Gives every rank the optimizer's groups of parameters in one order.

Megatron sorts the groups by their options, and leaves groups that differ only in how their gradients are reduced, as
experts' or as others', in the order in which the rank meets their parameters. Pipeline stages meet them in different
orders. Muon makes an optimizer of each, and the stages then wait for each other in different collectives.
"""

from megatron_patches.patch import Patch, wrap


def _experts_last(build, *args, **kwargs):
    """Of groups that have the same options, experts' come last."""
    groups = build(*args, **kwargs)
    kinds = []

    def kind(group):
        options = {name: value for name, value in group.items() if name not in ("params", "is_expert_parallel")}
        if options not in kinds:
            kinds.append(options)
        return kinds.index(options)

    return sorted(groups, key=lambda group: (kind(group), group["is_expert_parallel"]))


PATCH = Patch(
    name="parameter-groups",
    reason="the order of groups of parameters differs between pipeline stages, and Muon's steps then hang",
    removed_when="_get_param_groups sorts by is_expert_parallel too",
    targets=(wrap("megatron.core.optimizer", "_get_param_groups", _experts_last),),
)
