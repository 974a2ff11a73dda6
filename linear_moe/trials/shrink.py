"""A training command for many GPUs, shrunk to a few processes of a CPU.

What a command chooses stays: kinds of layers, optimizer, precision, checkpoint format, schedule, recomputation. Its
sizes become small, its data and folders become ours, and every parallel axis above 1 becomes 2 where four processes
can hold them together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

from linear_moe.trials.argument_sets import ArgumentSet, Options, to_words

PROCESSES = 4
LENGTH = 64
STEPS, FLOAT16_STEPS = 6, 40
"""Steps of a run; fp16 skips steps until its loss scale, which starts at 2^32, is small enough."""

TENSOR, PIPELINE = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
CONTEXT = "--context-parallel-size"
EXPERT, EXPERT_TENSOR = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
STAGE_LAYERS = "--num-layers-per-virtual-pipeline-stage"
STAGES = "--num-virtual-stages-per-pipeline-rank"
LAYOUT = "--pipeline-model-parallel-layout"
VIRTUAL = (STAGE_LAYERS, STAGES, LAYOUT)
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"

SIZES = {
    "--hidden-size": 64,
    "--num-attention-heads": 4,
    "--num-query-groups": 2,
    "--kv-channels": 16,
    "--ffn-hidden-size": 128,
    "--moe-ffn-hidden-size": 64,
    "--moe-shared-expert-intermediate-size": 64,
    "--moe-latent-size": 32,
    "--q-lora-rank": 32,
    "--kv-lora-rank": 16,
    "--qk-head-dim": 16,
    "--qk-pos-emb-head-dim": 8,
    "--v-head-dim": 16,
    "--linear-key-head-dim": 16,
    "--linear-value-head-dim": 16,
    "--linear-num-key-heads": 2,
    "--linear-num-value-heads": 4,
    "--mamba-num-heads": 4,
    "--mamba-head-dim": 16,
    "--mamba-state-dim": 16,
    "--dsa-indexer-head-dim": 16,
    "--dsa-indexer-n-heads": 4,
    "--dsa-indexer-topk": 16,
    "--mup-base-hidden-size": 32,
    "--seq-length": LENGTH,
    "--max-position-embeddings": LENGTH,
    "--make-vocab-size-divisible-by": 64,
    "--padded-vocab-size": 128,
    "--num-workers": 0,
    "--num-layers-at-start-in-bf16": 1,
    "--num-layers-at-end-in-bf16": 1,
    "--check-weight-hash-across-dp-replicas-interval": 2,
    "--distributed-timeout-minutes": 2,
    "--log-interval": 1,
    "--eval-iters": 1,
    "--wgrad-deferral-limit": 2,
    "--moe-router-topk": 2,
    "--moe-router-num-groups": 4,
    "--moe-router-group-topk": 2,
    "--recompute-num-layers": 1,
}
"""The largest value that an option keeps."""

NOT_HERE = (
    "--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--data-args-path",
    "--per-split-data-args-path", "--vocab-file", "--merge-file", "--tokenizer-model", "--tokenizer-type",
    "--tiktoken-pattern", "--vocab-size", "--split", "--data-cache-path", "--save", "--load", "--save-interval",
    "--tensorboard-dir", "--train-iters", "--train-samples", "--exit-interval", "--eval-interval",
    "--pretrained-checkpoint", "--wandb-entity", "--wandb-project", "--wandb-exp-name", "--wandb-save-dir",
    "--log-energy", "--save-retain-interval", "--tp-comm-overlap-cfg", "--profile", "--profile-step-start",
    "--profile-step-end", "--use-pytorch-profiler", "--ckpt-step", "--exit-duration-in-mins",
    "--finetune", "--no-load-optim", "--no-load-rng", "--no-save-optim", "--no-save-rng",
)  # fmt: skip
"""Options that name other people's files, folders and lengths, and what to take from their checkpoints; ours take
their place."""


@dataclass(frozen=True)
class Trial:
    """A shrunk command: its words without files and folders, the number of processes, and of training steps."""

    name: str
    script: str
    words: tuple[str, ...]
    processes: int
    steps: int
    save_interval: int


def shrink(given: ArgumentSet) -> Trial:
    """Raises ValueError for a number that is none."""
    options = {name: values for name, values in given.options.items() if name not in NOT_HERE}
    processes = _shrink_parallel_sizes(options)
    _shrink_sizes(options)
    _shrink_layers(options)
    batch = _shrink_batches(options, processes)
    steps = FLOAT16_STEPS if "--fp16" in options else STEPS
    _shrink_schedule(options, given.options, steps, batch)
    return Trial(
        name=given.name,
        script=given.script.replace("pretrain_mamba", "pretrain_hybrid"),
        words=tuple(to_words(options)),
        processes=processes,
        steps=steps,
        save_interval=steps // 2,
    )


def _number(options: Options, name: str, default: int = 1) -> int:
    values = options.get(name)
    if not values:
        return default
    try:
        return int(float(values[0]))
    except ValueError as error:
        raise ValueError(f"{name} {values[0]}: expected a number") from error


def _set(options: Options, name: str, value: object) -> None:
    options[name] = (str(value),)


def _shrink_parallel_sizes(options: Options) -> int:
    """Sets the sizes of the parallel axes. Returns the number of processes."""
    virtual = any(name in options for name in VIRTUAL)
    hierarchy = "--hierarchical-context-parallel-sizes" in options
    given = {name: _number(options, name) for name in (TENSOR, PIPELINE, CONTEXT, EXPERT)}
    worth = {TENSOR: 4, PIPELINE: 6 if virtual else 3, CONTEXT: 5, EXPERT: 5}
    small = {name: 1 if size == 1 else 4 if hierarchy and name == CONTEXT else 2 for name, size in given.items()}
    expert_tensor = _number(options, EXPERT_TENSOR, given[TENSOR])
    fits = []
    for kept in product(*({1, size} for size in small.values())):
        sizes = dict(zip(small, kept, strict=True))
        group = sizes[TENSOR] * sizes[PIPELINE] * sizes[CONTEXT]
        expert_tensor_size = sizes[TENSOR] if expert_tensor == given[TENSOR] else min(expert_tensor, sizes[TENSOR], 2)
        experts = expert_tensor_size * sizes[EXPERT] * sizes[PIPELINE]
        worlds = [world for world in range(group, PROCESSES + 1, group) if world % experts == 0]
        if worlds:
            value = sum(worth[name] for name, size in sizes.items() if size > 1)
            # two data-parallel ranks where four processes hold them, as every command for eight GPUs has
            world = next((world for world in worlds if world >= 2 * group), worlds[0])
            fits.append((value, -world, world, expert_tensor_size, sizes))
    _, _, world, expert_tensor_size, sizes = max(fits, key=lambda fit: fit[:2])
    for name, size in sizes.items():
        if name in options:
            _set(options, name, size)
    if EXPERT_TENSOR in options:
        _set(options, EXPERT_TENSOR, expert_tensor_size)
    if hierarchy:
        options["--hierarchical-context-parallel-sizes"] = ("2", "2")
    replicas = world // (sizes[TENSOR] * sizes[PIPELINE] * sizes[CONTEXT])
    if replicas % _number(options, "--num-distributed-optimizer-instances"):
        del options["--num-distributed-optimizer-instances"]
    return world


def _shrink_sizes(options: Options) -> None:
    for name, most in SIZES.items():
        if name in options:
            _set(options, name, min(_number(options, name), most))
    if "--num-experts" in options:
        _set(options, "--num-experts", 8 if "--moe-router-num-groups" in options else 4)
    if "--window-size" in options:
        _set(options, "--window-size", f"{LENGTH // 4 - 1},0")


def _shrink_layers(options: Options) -> None:
    """Few layers, of every kind that the command has, on every stage of the pipeline."""
    if "--hybrid-layer-pattern" in options or "--hybrid-override-pattern" in options:
        _shrink_pattern(options)
        return
    if "--num-layers" not in options:
        return
    stages = _number(options, PIPELINE)
    virtual = 2 if stages > 1 and any(name in options for name in VIRTUAL) else 1
    if virtual == 1:
        for name in VIRTUAL:
            options.pop(name, None)
    kinds = max(2, _number(options, "--linear-attention-freq") if _is_number(options, "--linear-attention-freq") else 2)
    outside = sum(f"--account-for-{part}-in-pipeline-split" in options for part in ("embedding", "loss"))
    layers = stages * virtual
    while layers - outside < kinds:
        layers += stages * virtual
    layers -= outside
    if LAYOUT in options:
        extra = "m" * _number(options, "--mtp-num-layers", 0)
        _set(options, LAYOUT, "|".join(["Et", *["t"] * (stages * virtual - 2), f"t{extra}L"]))
        layers = stages * virtual
    if stages == 1:
        for name in (FIRST, LAST):
            options.pop(name, None)
    elif FIRST in options and LAST in options and stages == 2:
        _set(options, FIRST, virtual)
        _set(options, LAST, 2 * virtual)
        layers = 3 * virtual
    if STAGE_LAYERS in options:
        _set(options, STAGE_LAYERS, 1)
    if STAGES in options:
        _set(options, STAGES, 2)
    _set(options, "--num-layers", layers)
    if "--moe-layer-freq" in options and not _is_number(options, "--moe-layer-freq"):
        dense = "[0]" in options["--moe-layer-freq"][0]
        _set(options, "--moe-layer-freq", f"([0]*{int(dense)}+[1]*{layers - dense})")


def _is_number(options: Options, name: str) -> bool:
    return name in options and bool(re.fullmatch(r"\d+", options[name][0]))


def _shrink_pattern(options: Options) -> None:
    """Every letter of a hybrid model's pattern once on every stage; multi-token prediction as it is."""
    name = "--hybrid-layer-pattern" if "--hybrid-layer-pattern" in options else "--hybrid-override-pattern"
    main, *extra = options[name][0].split("/")
    letters = "".join(dict.fromkeys(main.replace("|", "")))
    segments = _number(options, PIPELINE) * (2 if "|" in main and _number(options, PIPELINE) > 1 else 1)
    parts = [letters] * segments if segments > 1 else [letters]
    _set(options, name, "/".join(["|".join(parts) if "|" in main else "".join(parts), *extra]))
    if "--num-layers" in options:
        _set(options, "--num-layers", len(letters) * len(parts))


def _shrink_batches(options: Options, processes: int) -> int:
    """Two micro-batches a step, or four through a pipeline. Returns the global batch size."""
    stages = _number(options, PIPELINE)
    micro = min(_number(options, "--micro-batch-size"), 2)
    replicas = processes // (_number(options, TENSOR) * stages * _number(options, CONTEXT))
    batch = micro * replicas * (4 if stages > 1 else 2)
    _set(options, "--micro-batch-size", micro)
    if "--global-batch-size" in options:
        _set(options, "--global-batch-size", batch)
    if "--eval-global-batch-size" in options:
        _set(options, "--eval-global-batch-size", batch)
    if "--step-batch-size-schedule" in options:
        _set(options, "--step-batch-size-schedule", f"0:{batch} 1B:{2 * batch}")
    if "--rampup-batch-size" in options:
        options["--rampup-batch-size"] = (str(batch // 2), str(batch // 2), str(batch))
    if "--microbatch-group-size-per-virtual-pipeline-stage" in options:
        _set(options, "--microbatch-group-size-per-virtual-pipeline-stage", stages)
    return batch


def _shrink_schedule(options: Options, given: Options, steps: int, batch: int) -> None:
    """As many steps as a run has, one of validation, a learning rate that moves a small model, hardly any warm-up."""
    options.setdefault("--eval-iters", ("1",))  # Megatron's default is 100
    in_samples = "--train-samples" in given
    _set(options, "--train-samples" if in_samples else "--train-iters", steps * batch if in_samples else steps)
    for name, value in {
        "--lr": 3e-3,
        "--min-lr": 3e-4,
        "--decoupled-lr": 5e-3,
        "--decoupled-min-lr": 5e-4,
        "--lr-decay-iters": steps,
        "--lr-decay-samples": steps * batch,
        "--lr-wsd-decay-iters": 2,
        "--lr-wsd-decay-samples": 2 * batch,
    }.items():
        if name in options:
            _set(options, name, value)
    for name, most in {"--lr-warmup-iters": 1, "--lr-warmup-samples": batch}.items():
        if name in options:
            _set(options, name, min(_number(options, name), most))
