"""Sizes of a recipe's model, from its arguments: parameters, those at work for a token, and memory a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from linear_moe.pattern import main_layers, prediction_layers
from linear_moe.recipes.recipe import Recipe
from mom_layers.recur.rules import get_rule
from mom_layers.settings import MixerSettings


@dataclass(frozen=True)
class Size:
    """Numbers of parameters.

    all: of the model. at_work: that compute with a token; an embedding counts once, as the output layer.
    experts, memories: of routed experts, and of routed memories, which expert parallelism splits.
    """

    all: int
    at_work: int
    experts: int = 0
    memories: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.all + other.all,
            self.at_work + other.at_work,
            self.experts + other.experts,
            self.memories + other.memories,
        )


def _dense(count: int) -> Size:
    return Size(count, count)


def _memories(recipe: Recipe, hidden: int) -> Size:
    """A layer R: norm, router, queries, output gate, output, convolutions, and the projections of the memories."""
    given = recipe.settings
    settings = MixerSettings(
        num_heads=given["HEADS"], head_dim=given["HEAD_DIM"], num_memories=given.get("MEMORIES", 4),
        topk=given.get("TOPK", 2),
    )  # fmt: skip
    keys, values = settings.key_width, settings.value_width
    rule = get_rule(settings.rule)
    rule_parameters = 0
    for shape in rule.parameter_shapes(settings.head_dim).values():
        each = settings.num_heads
        for extent in shape:
            each *= extent
        rule_parameters += each
    common = hidden + hidden * settings.num_memories + hidden * (keys + 2 * values) + values // settings.num_heads
    common += settings.conv_kernel * (2 * keys + values) + rule_parameters
    projection = hidden * sum(settings.projection_sizes)
    routed = settings.num_memories * projection
    return Size(common + routed + projection, common + (settings.topk + 1) * projection, memories=routed)


def _softmax(recipe: Recipe, hidden: int) -> Size:
    given = recipe.arguments
    heads = recipe.settings["ATTENTION_HEADS"]
    head = given.get("kv-channels", hidden // heads)
    groups = given.get("num-query-groups", heads)
    norms = hidden + (2 * head if given.get("qk-layernorm") else 0)
    return _dense(hidden * head * (heads + 2 * groups) + hidden * head * heads + norms)


def _multi_latent(recipe: Recipe, hidden: int) -> Size:
    given, heads = recipe.arguments, recipe.settings["ATTENTION_HEADS"]
    query, position, value = given["qk-head-dim"], given["qk-pos-emb-head-dim"], given["v-head-dim"]
    low, rank = given.get("q-lora-rank"), given["kv-lora-rank"]
    normed = bool(given.get("qk-layernorm"))
    queries = heads * (query + position)
    count = hidden * queries if low is None else low * (hidden + queries) + normed * low
    count += hidden * (rank + position) + rank * heads * (query + value) + normed * rank
    return _dense(count + heads * value * hidden + hidden)


def _experts(recipe: Recipe, hidden: int) -> Size:
    given = recipe.arguments
    experts, chosen, width = given["num-experts"], given["moe-router-topk"], given["moe-ffn-hidden-size"]
    each = 3 * hidden * width
    common = hidden + hidden * experts + 3 * hidden * given.get("moe-shared-expert-intermediate-size", 0)
    return Size(common + experts * each, common + chosen * each, experts=experts * each)


def size_of(recipe: Recipe, vocabulary: int | None = None) -> Size:
    """The size of a recipe's model.

    vocabulary: rows of the embedding; without, the recipe's.
    """
    hidden = recipe.settings["HIDDEN"]
    layers = {
        "R": _memories(recipe, hidden),
        "-": _dense(3 * hidden * recipe.settings["FFN"] + hidden),
    }
    if "*" in recipe.pattern:
        layers["*"] = _softmax(recipe, hidden)
    if "+" in recipe.pattern:
        layers["+"] = _multi_latent(recipe, hidden)
    if "E" in recipe.pattern:
        layers["E"] = _experts(recipe, hidden)
    embedding = hidden * (recipe.vocabulary if vocabulary is None else vocabulary)
    untied = bool(recipe.arguments.get("untie-embeddings-and-output-weights"))
    total = Size(embedding * (1 + untied) + hidden, embedding + hidden)
    for symbol in main_layers(recipe.pattern):
        total += layers[symbol]
    prediction, steps = prediction_layers(recipe.pattern)
    for symbol in prediction * steps:  # trained, and not at work when the model generates
        total += replace(layers[symbol], at_work=0)
    return total + Size(steps * (2 * hidden * hidden + 3 * hidden), 0)


def memory_a_gpu(recipe: Recipe) -> float:
    """GiB of weights, gradients and Adam's state on a GPU of the recipe's layout, without activations, where stages
    hold equal parts: 2 bytes a weight in bf16, 4 a gradient, and 12 of Adam's state, which the distributed optimizer
    splits over the copies of a parameter.
    """
    size, layout = size_of(recipe), recipe.layout
    gpus, stages = layout.get("GPUS", 1), layout.get("TP", 1) * layout.get("PP", 1)
    experts = layout.get("EP", 1)
    divides = recipe.settings.get("MEMORIES", 4) % experts == 0  # else every rank holds all memories
    split = size.experts + divides * size.memories
    here = (size.all - split + split / experts) / stages
    return (6 * here + 12 * size.all / gpus) / 2**30
