"""Which checks make a self-test: all, the few that one training run needs, and a tiny form for the interpreter."""

from __future__ import annotations

import math
from functools import partial

import torch

from mom_layers.recur.rules import get_rule, rule_names
from mom_layers.selftest import decoding, operations, recurrences
from mom_layers.selftest.cases import Check, Setting
from mom_layers.selftest.one_memory import one_memory
from mom_layers.selftest.operations import Tokens
from mom_layers.settings import MixerSettings

SIZES = ((256, 256), (128, 128), (64, 128))
WIDTH = 512  # columns of all heads' keys: 2 heads of 256, 8 of 64
TIMED = Tokens([2048] * 4)
LENGTHS = (0, 1, 2, 63, 64, 65, 130)
MANY_SHORT = (5,) * 40
CUTS = ((3, 0, 65, 1), (0, 2, 70, 64), (1, 64, 0, 1))


def all_checks(setting: Setting) -> dict[str, Check]:
    """Every kernel at a few shapes, by the name of the check."""
    ragged, masked = Tokens(LENGTHS), Tokens(LENGTHS, masked=True)
    alone = Tokens(LENGTHS, memories=3, shared=False)
    hidden, sixteen = 1024, setting.dtype
    types = dict.fromkeys((sixteen, torch.float16, torch.float32))
    checks = {
        "route": partial(operations.routing, tokens=300, memories=4, topk=2, timed=16384),
        "route, many memories": partial(operations.routing, tokens=300, memories=64, topk=8),
        "routing plan": partial(operations.planning, tokens=(ragged, masked, alone), timed=TIMED),
        "gather rows": partial(operations.gathering, tokens=ragged, channels=hidden, timed=TIMED),
        "spare rows": partial(operations.spare, tokens=alone, channels=hidden),
        "grouped projection": partial(
            operations.projection, tokens=ragged, inputs=hidden, outputs=2 * WIDTH + 16, dtypes=tuple(types),
            timed=TIMED,
        ),
    }  # fmt: skip
    for k_dim, v_dim in SIZES:
        heads = WIDTH // k_dim
        size = {"heads": heads, "k_dim": k_dim, "v_dim": v_dim}
        about = f"K {k_dim} V {v_dim}"
        checks[f"convolutions, {about}"] = partial(operations.convolutions, tokens=masked, timed=TIMED, **size)
        checks[f"one memory, {about}"] = partial(one_memory, lengths=LENGTHS, timed=2048, **size)
        if k_dim == v_dim:
            checks[f"combine, {about}"] = partial(
                operations.combining, tokens=(ragged, alone), heads=heads, v_dim=v_dim, timed=TIMED
            )
        for rule in by_family():
            checks[f"{rule}, {about}"] = partial(recurrences.recurrence, name=rule, timed=True, **size)
            if get_rule(rule).decode_step is not None:
                checks[f"decode step of {rule}, {about}"] = partial(
                    decoding.decoding, rule=rule, hidden=hidden, batches=(1, 5), timed=16, **size
                )
    families = by_family()
    for rule in with_kernels():
        small = smallest_size(rule)
        keys = 128 if get_rule(rule).has_kernels(128, 128) else small
        checks[f"gates of {rule}"] = partial(recurrences.gates, name=rule, rows=300, heads=4, k_dim=keys, v_dim=128)
        if rule not in families:
            checks[f"{rule}, {setting.dtype}".replace("torch.", "")] = partial(
                recurrences.recurrence, name=rule, heads=2, k_dim=small, v_dim=small, every_set=False,
                cases=(((0, 1, 63, 64, 65), True),),
            )  # fmt: skip
            continue
        checks[f"{rule}, float32"] = partial(
            recurrences.recurrence, name=rule, heads=2, k_dim=small, v_dim=small, dtype=torch.float32,
            cases=(((0, 1, 63, 64, 65), True),),
        )  # fmt: skip
        checks[f"state passing of {rule}"] = partial(
            recurrences.state_passing, name=rule, heads=WIDTH // 128, k_dim=128, v_dim=128, cuts=CUTS
        )
    # Kernels of their own compute the chunks whose decay is strong.
    checks["hgrn2, strong decay"] = partial(
        recurrences.recurrence, name="hgrn2", heads=WIDTH // 128, k_dim=128, v_dim=128, gate_scale=8.0
    )
    # The longest checks first, so that no process is left with a long check at the end.
    recurrent = tuple(with_kernels())
    return dict(sorted(checks.items(), key=lambda item: not item[0].startswith(recurrent)))


def with_kernels() -> list[str]:
    """The rules whose recurrence Triton kernels compute: there is nothing to check in the others."""
    return [name for name in rule_names() if get_rule(name).cost_without_kernels is None]


def by_family() -> tuple[str, ...]:
    """A rule of every kernel family, which stands for the family's kernels: among the family's rules with the most head
    sizes, the rule with the most gates."""
    found: dict[str, str] = {}
    for name in sorted(
        with_kernels(), key=lambda name: (len(get_rule(name).head_sizes), len(get_rule(name).raw_gates))
    ):
        found[get_rule(name).family or name] = name
    return tuple(sorted(found.values()))


def smallest_size(rule: str) -> int:
    """64, or the head size nearest to it that a rule's kernels take."""
    both = (size for size in get_rule(rule).head_sizes if get_rule(rule).has_kernels(size, size))
    return min(both, key=lambda size: abs(size - 64), default=64)


def checks_of_a_run(setting: Setting, settings: MixerSettings, hidden_size: int, sliced: bool) -> dict[str, Check]:
    """The kernels that one training run launches, at its own head sizes, so that the run finds them compiled.

    Args:
        settings: of the run's layers, with the heads of one rank.
        hidden_size: D.
        sliced: whether context parallelism cuts sequences.
    """
    k_dim, v_dim = settings.head_dim, settings.value_dim
    # Fewer heads where they are large: the plain loop keeps a state of each head for every row.
    heads = math.gcd(settings.num_heads, max(1, 4 * 256 * 256 // (k_dim * v_dim)))
    size = {"heads": heads, "k_dim": k_dim, "v_dim": v_dim}
    rule = settings.rule
    checks = {
        rule: partial(
            recurrences.recurrence, name=rule, cases=(((0, 1, 63, 64, 65), sliced), (MANY_SHORT, False)),
            every_set=False, **size,
        ),
    }  # fmt: skip
    if settings.alone:
        checks["one memory"] = partial(one_memory, lengths=(0, 1, 63, 65), width=settings.conv_kernel, **size)
    else:
        checks |= _routed_checks(setting, settings, hidden_size, size)
    checks["gates"] = partial(recurrences.gates, name=rule, rows=200, **size)
    if sliced and rule in with_kernels():
        checks["state passing"] = partial(recurrences.state_passing, name=rule, cuts=CUTS, **size)
    return checks


def _routed_checks(setting: Setting, settings: MixerSettings, hidden_size: int, size: dict) -> dict[str, Check]:
    """What a layer with a router launches beside its recurrence."""
    tokens = Tokens((0, 1, 63, 65), settings.num_memories, settings.topk, settings.shared_memory)
    heads, v_dim = size["heads"], size["v_dim"]
    width = sum(settings.projection_sizes) // settings.num_heads * heads
    return {
        "convolutions": partial(operations.convolutions, tokens=tokens, tails=False, **size),
        "grouped projection": partial(
            operations.projection, tokens=tokens, inputs=min(hidden_size, 1024), outputs=width, dtypes=(setting.dtype,)
        ),
        "combine": partial(operations.combining, tokens=(tokens,), heads=heads, v_dim=v_dim),
        "route": partial(operations.routing, tokens=100, memories=settings.num_memories, topk=settings.topk),
        "routing plan": partial(operations.planning, tokens=(tokens,)),
        "gather rows": partial(operations.gathering, tokens=tokens, channels=min(hidden_size, 1024)),
    }  # fmt: skip


def tiny_checks(setting: Setting) -> dict[str, Check]:
    """Every kernel of the general sets once, so small that Triton's interpreter runs it."""
    tokens, masked = Tokens((0, 1, 5)), Tokens((0, 1, 5), masked=True)
    alone = Tokens((3,), memories=3, shared=False)
    size = {"heads": 1, "k_dim": 16, "v_dim": 32}
    checks = {
        "route": partial(operations.routing, tokens=7, memories=4, topk=2),
        "routing plan": partial(operations.planning, tokens=(tokens, masked, alone)),
        "gather rows": partial(operations.gathering, tokens=tokens, channels=20),
        "spare rows": partial(operations.spare, tokens=alone, channels=20),
        "grouped projection": partial(
            operations.projection, tokens=tokens, inputs=24, outputs=18, dtypes=(torch.float32,)
        ),
        "convolutions": partial(operations.convolutions, tokens=masked, **size),
        "combine": partial(operations.combining, tokens=(tokens, alone), heads=2, v_dim=16),
        "one memory": partial(one_memory, lengths=(0, 1, 5), **size),
        "one memory without a convolution": partial(one_memory, lengths=(2, 1), width=1, **size),
    }  # fmt: skip
    # Scalar decay cuts a segment of more than eight chunks into parts.
    checks["mamba2, long segments"] = partial(recurrences.recurrence, name="mamba2", cases=(((515,), True),), **size)
    for rule in with_kernels():
        checks[rule] = partial(
            recurrences.recurrence, name=rule, cases=(((0, 1, 65), True), ((3, 2), False)), **size
        )  # fmt: skip
        checks[f"gates of {rule}"] = partial(recurrences.gates, name=rule, rows=5, **size)
        checks[f"decode step of {rule}"] = partial(decoding.decoding, rule=rule, hidden=16, batches=(1, 2), **size)
        checks[f"state passing of {rule}"] = partial(
            recurrences.state_passing, name=rule, heads=1, k_dim=16, v_dim=16, cuts=((1, 0, 3), (2, 1, 0), (1, 0, 2))
        )
    return checks
