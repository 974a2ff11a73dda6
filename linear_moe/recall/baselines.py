"""Which models are compared: MoM models, and for each the baselines that equal it in one respect.

Where a size cannot be matched exactly the baseline gets the next larger one, never less than MoM has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from linear_moe.recall.models import SOFTMAX, TEXT_CONV, Mixer, Shape, count_parameters
from linear_moe.recall.names import (
    ATTENTION,
    MATCHES,
    PARAMETERS,
    STATE_BY_HEADS,
    STATE_BY_KEYS,
    STATE_BY_VALUES,
    STATE_PER_MEMORY,
    TIME,
)
from mom_layers import get_rule

MOST_HEADS = 64  # where the search for a baseline as slow as MoM ends
SOFTMAX_HEAD = 32  # of attention; its heads fill the hidden size
MOM = re.compile(
    r"((?P<rule>[^:]+):)?(?P<memories>[0-9]+)/(?P<topk>[0-9]+)(?P<ends>(\+(shared|text|0*[1-9][0-9]*heads))*)"
)


@dataclass(frozen=True)
class Comparison:
    """A MoM model and its baselines, {what is equal: baseline}. A baseline that no kernel can run is left out."""

    mom: Mixer
    baselines: dict[str, Mixer]

    @property
    def mixers(self) -> list[Mixer]:
        """All of them, each once: first what the claim is about, then the rest."""
        order = [STATE_PER_MEMORY, STATE_BY_HEADS, ATTENTION, PARAMETERS, TIME, STATE_BY_KEYS, STATE_BY_VALUES]
        return list(dict.fromkeys([self.mom, *(self.baselines[name] for name in order if name in self.baselines)]))


def parse_mom(text: str, base: Mixer) -> Mixer:
    """A MoM model from words such as ``8/2``, ``gla:4/2`` or ``4/2+shared+text+2heads``; else as ``base``.

    Raises ValueError for anything else.
    """
    found = MOM.fullmatch(text)
    ends = found["ends"].split("+")[1:] if found else []
    if not found or len({end.lstrip("0123456789") for end in ends}) < len(ends):
        raise ValueError(
            f"{text!r} names no MoM model: write memories/top-k, such as 8/2, 4/2+shared, gla:4/2 or 4/2+text+2heads"
        )
    mixer = replace(
        base,
        rule=base.rule if found["rule"] is None else found["rule"],
        memories=int(found["memories"]),
        topk=int(found["topk"]),
        shared="shared" in ends,
        text_conv=TEXT_CONV if "text" in ends else 0,
        heads=next((int(end.removesuffix("heads")) for end in ends if end.endswith("heads")), base.heads),
    )
    get_rule(mixer.rule)
    if mixer.memories < 2 or not 1 <= mixer.topk <= mixer.memories:
        raise ValueError(f"{text!r}: a MoM model has at least 2 memories, and top-k from 1 to their number")
    return mixer


def names_of_set(name: str) -> list[str]:
    """The MoM models of a set: "decisive", one model, or "all", every combination that is compared."""
    if name == "decisive":
        return ["4/2"]
    shared = ("", "+shared")
    grid = [f"{memories}/{topk}{end}" for memories in (2, 4, 8) for topk in (2, 1) for end in shared]
    return ["4/2", *(f"{rule}:{mom}" for rule in ("gated_deltanet", "gla") for mom in grid)]


def compare(
    mom: Mixer,
    shape: Shape,
    vocabulary: int,
    milliseconds: Callable[[Mixer], float] | None = None,
    wanted: Sequence[str] = tuple(MATCHES.values()),
) -> Comparison:
    """Finds a MoM model's baselines.

    Args:
        milliseconds: a mixer's time a step, measured alone; without it no baseline matches MoM's time.
        wanted: the baselines to find.
    """
    alone = mom.alone
    baselines = {
        STATE_PER_MEMORY: alone,
        STATE_BY_HEADS: replace(alone, heads=alone.heads * mom.all_memories),
        PARAMETERS: match_parameters(mom, alone, shape, vocabulary),
        ATTENTION: Mixer(SOFTMAX, max(1, shape.hidden // SOFTMAX_HEAD), SOFTMAX_HEAD, SOFTMAX_HEAD),
    }
    for name, field in ((STATE_BY_KEYS, "key_size"), (STATE_BY_VALUES, "value_size")):
        sizes = sorted(get_rule(mom.rule).kernel_sizes(of_keys=field == "key_size"))
        enough = [size for size in sizes if size >= getattr(alone, field) * mom.all_memories]
        if enough:
            baselines[name] = replace(alone, **{field: enough[0]})
    if milliseconds is not None and TIME in wanted:
        baselines[TIME] = match_time(mom, alone, milliseconds)
    return Comparison(mom, {name: baselines[name] for name in wanted if name in baselines})


def match_parameters(mom: Mixer, alone: Mixer, shape: Shape, vocabulary: int) -> Mixer:
    """The rule alone with the fewest heads that have at least MoM's parameters."""
    target = count_parameters(mom, shape, vocabulary)
    one, two = (count_parameters(replace(alone, heads=heads), shape, vocabulary) for heads in (1, 2))
    return replace(alone, heads=max(1, 1 + -(-(target - one) // (two - one))))


def match_time(mom: Mixer, alone: Mixer, milliseconds: Callable[[Mixer], float]) -> Mixer:
    """The rule alone with the fewest heads whose step takes as long as MoM's, between measured powers of two.

    Times grow with the heads along a line between two measured counts; MOST_HEADS where even those are faster.
    """
    target = milliseconds(mom)
    low = high = alone.heads
    while milliseconds(replace(alone, heads=high)) < target and high < MOST_HEADS:
        low, high = high, min(2 * high, MOST_HEADS)
    below, above = (milliseconds(replace(alone, heads=heads)) for heads in (low, high))
    if above <= below or above <= target:
        return replace(alone, heads=high)
    heads = low + (high - low) * max(0.0, target - below) / (above - below)
    return replace(alone, heads=int(-(-heads // 1)))


def all_mixers(comparisons: Sequence[Comparison]) -> list[Mixer]:
    """Every model of the comparisons once, in their order."""
    return list(dict.fromkeys(mixer for comparison in comparisons for mixer in comparison.mixers))
