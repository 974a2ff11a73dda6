"""The models of a comparison, and the arguments of `linear_moe.pretrain` that train each: the mixer alone differs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace


@dataclass(frozen=True)
class Shape:
    """Sizes that all models of a comparison share.

    Attributes:
        heads, head_dim: of a memory of MoM, whose value size is its key size.
        attention_every: N of "one softmax layer in N" of the hybrid model.
        length: tokens of a training sequence.
        vocabulary: tokens that the tokenizer has at most.
    """

    layers: int = 8
    hidden: int = 640
    ffn: int = 1792
    attention_heads: int = 10
    heads: int = 4
    head_dim: int = 128
    attention_every: int = 8
    length: int = 2048
    vocabulary: int = 16384


@dataclass(frozen=True)
class Training:
    """How every model of a comparison is trained.

    Attributes:
        tokens: of the training; rounded down to whole steps.
        batch: sequences a step.
        micro_batch: sequences in a GPU's memory at a time.
        gpus: that train the model together, by data parallelism.
        rate: peak of the learning rate, which rises linearly over ``warm_up`` of the steps and falls to a tenth along
            a cosine.
    """

    tokens: int = 150_000_000
    batch: int = 32
    micro_batch: int = 32
    rate: float = 1e-3
    warm_up: float = 0.02
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    precision: str = "bf16"
    gpus: int = 1


@dataclass(frozen=True)
class Mixer:
    """The token mixer of a model.

    Attributes:
        memories: routed memories; 0 for softmax attention in every layer.
        key_size: of a head; its value size is the same.
        hybrid: one layer in ``Shape.attention_every`` is softmax attention.
        text_conv: width of the convolution over the text; 0 for none. The memories then have no convolutions of
            their own.
    """

    memories: int = 0
    topk: int = 0
    shared: bool = False
    heads: int = 0
    key_size: int = 0
    balancing: float = 0.0
    single_projection: bool = False
    hybrid: bool = False
    text_conv: int = 0
    rule: str = "gated_deltanet"

    @property
    def all_memories(self) -> int:
        return self.memories + int(self.shared)

    @property
    def state(self) -> int:
        """Numbers that a layer's recurrent states hold; 0 for softmax attention, whose cache grows."""
        return self.all_memories * self.heads * self.key_size**2


MOM = ("mom", "4 memories, top-2, shared memory")
EQUAL_TOKENS = ("mom", "mom-text-conv", "mom-hybrid", "gdn-state", "gdn", "softmax")
"""The slowest first, so that all GPUs end together."""
ABLATIONS = ("mom-m2", "mom-m8", "mom-k1", "mom-k4", "mom-unshared", "mom-balancing-0", "mom-balancing-5e-3",
             "mom-balancing-1e-2", "mom-single-projection", "gdn-text-conv", "gdn-state-text-conv")  # fmt: skip
SMALL = "mom-small"
TEXT_CONV = "-text-conv"
"""End of the name of a model that has a convolution over the text."""
SMALL_SHAPE = {"hidden": 384, "ffn": 1024, "attention_heads": 6, "head_dim": 64}
"""The sizes of SMALL: its export takes at most 60 MB."""

TITLES = {
    "softmax": "softmax attention",
    "gdn": "GDN, one memory",
    "gdn-state": "GDN, MoM's state in all by K x V",
    "gdn-heads": "GDN, MoM's state in all by heads",
    "mom": "MoM 4/2, shared",
    "mom-text-conv": "MoM 4/2, shared, convolution over the text",
    "gdn-text-conv": "GDN, one memory, convolution over the text",
    "gdn-state-text-conv": "GDN, MoM's state in all by K x V, convolution over the text",
    "mom-hybrid": "MoM 4/2, shared, one softmax layer in N",
    "mom-m2": "MoM 2/2, shared",
    "mom-m8": "MoM 8/2, shared",
    "mom-k1": "MoM 4/1, shared",
    "mom-k4": "MoM 4/4, shared",
    "mom-unshared": "MoM 4/2, no shared memory",
    "mom-balancing-0": "MoM 4/2, shared, balancing 0",
    "mom-balancing-5e-3": "MoM 4/2, shared, balancing 5e-3",
    "mom-balancing-1e-2": "MoM 4/2, shared, balancing 1e-2",
    "mom-single-projection": "MoM 4/2, shared, one projection",
    SMALL: "MoM 4/2, shared, convolution over the text, small",
}


def mixer_of(name: str, shape: Shape) -> Mixer:
    """The mixer of a name of TITLES.

    "gdn-state" holds as many numbers as MoM's states together: heads of twice the key and value size, a quarter as many
    as MoM's heads of all memories, which costs about as many parameters as MoM has. "gdn-heads" has MoM's head size and
    the heads of all memories.

    Raises ValueError where MoM's state cannot be matched with whole heads.
    """
    if name.endswith(TEXT_CONV):
        return replace(mixer_of(name.removesuffix(TEXT_CONV), shape), text_conv=4)
    if name == SMALL:
        return mixer_of(f"mom{TEXT_CONV}", shape)
    mom = Mixer(4, 2, True, shape.heads, shape.head_dim, balancing=1e-3)
    alone = replace(mom, memories=1, topk=1, shared=False, balancing=0.0)
    heads = shape.heads * mom.all_memories
    if name == "gdn-state" and heads % 4:
        raise ValueError(f"{name}: {heads} heads of all memories are no multiple of 4: give another number of heads")
    mixers = {
        "softmax": Mixer(),
        "gdn": alone,
        "gdn-state": replace(alone, heads=heads // 4, key_size=2 * shape.head_dim),
        "gdn-heads": replace(alone, heads=heads),
        "mom": mom,
        "mom-hybrid": replace(mom, hybrid=True),
        "mom-m2": replace(mom, memories=2),
        "mom-m8": replace(mom, memories=8),
        "mom-k1": replace(mom, topk=1),
        "mom-k4": replace(mom, topk=4),
        "mom-unshared": replace(mom, shared=False),
        "mom-balancing-0": replace(mom, balancing=0.0),
        "mom-balancing-5e-3": replace(mom, balancing=5e-3),
        "mom-balancing-1e-2": replace(mom, balancing=1e-2),
        "mom-single-projection": replace(mom, single_projection=True),
    }
    return mixers[name]


@dataclass(frozen=True)
class Job:
    """One model to train: its name, and all settings."""

    name: str
    mixer: Mixer
    shape: Shape
    training: Training

    @property
    def key(self) -> str:
        """A short name, which tells the jobs of one comparison apart."""
        training = self.training
        return f"{self.name}_{training.tokens / 1e6:g}M_{training.rate:g}_seed{training.seed}"

    @property
    def steps(self) -> int:
        return max(1, self.training.tokens // (self.training.batch * self.shape.length))

    def row(self) -> dict[str, str]:
        """All settings, as a CSV file has them: what tells a trained model from every other."""
        values = asdict(self.mixer) | asdict(self.shape) | asdict(self.training)
        values["mom_heads"] = values.pop("heads")
        row = {"model": self.name, "state": self.mixer.state, **values, "heads": self.mixer.heads}
        return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in row.items()}

    def arguments(self) -> list[str]:
        """Arguments of `linear_moe.pretrain`, without those of data, folders and reports."""
        shape, training = self.shape, self.training
        words = [*_mixer_arguments(self.mixer, shape)]
        words += ["--num-layers", shape.layers, "--hidden-size", shape.hidden, "--ffn-hidden-size", shape.ffn]
        words += ["--num-attention-heads", shape.attention_heads, "--swiglu", "--disable-bias-linear"]
        words += ["--position-embedding-type", "rope", "--normalization", "RMSNorm", "--norm-epsilon", 1e-6]
        words += ["--attention-dropout", 0, "--hidden-dropout", 0]
        words += ["--seq-length", shape.length, "--max-position-embeddings", shape.length]
        words += ["--micro-batch-size", training.micro_batch, "--global-batch-size", training.batch]
        words += ["--train-iters", self.steps, "--seed", training.seed + 1]  # Megatron takes no seed of 0
        words += ["--optimizer", "adam", "--adam-beta1", 0.9, "--adam-beta2", 0.95, "--use-distributed-optimizer"]
        words += ["--weight-decay", training.weight_decay, "--clip-grad", training.clip]
        words += ["--lr", training.rate, "--min-lr", training.rate / 10, "--lr-decay-style", "cosine"]
        words += ["--lr-warmup-fraction", training.warm_up]
        words += ["--bf16"] if training.precision == "bf16" else []
        return [str(word) for word in words]


def _mixer_arguments(mixer: Mixer, shape: Shape) -> list:
    if not mixer.memories:
        return ["--token-mixer", "attention"]
    words = ["--token-mixer", "mom", "--mom-rule", mixer.rule]
    words += ["--mom-num-memories", mixer.memories, "--mom-topk", mixer.topk]
    words += ["--mom-shared-memory" if mixer.shared else "--no-mom-shared-memory"]
    words += ["--mom-num-heads", mixer.heads, "--mom-head-dim", mixer.key_size]
    words += ["--mom-aux-loss-coeff", mixer.balancing]
    words += ["--mom-single-kv-proj"] if mixer.single_projection else []
    words += ["--mom-text-conv", mixer.text_conv, "--mom-conv-kernel", 1] if mixer.text_conv else []
    words += ["--linear-attention-freq", shape.attention_every] if mixer.hybrid else []
    return words


def make_job(name: str, shape: Shape, training: Training) -> Job:
    """The job of a name of TITLES. Raises ValueError for sizes that do not fit together."""
    if name not in TITLES:
        raise ValueError(f"there is no model {name!r}; there are {', '.join(TITLES)}")
    if name == SMALL:
        known = {field.name for field in fields(Shape)}
        smaller = {key: value for key, value in SMALL_SHAPE.items() if key in known}
        shape = replace(shape, **{key: min(value, getattr(shape, key)) for key, value in smaller.items()})
    if training.batch % (training.micro_batch * training.gpus):
        raise ValueError(
            f"a batch of {training.batch} is no multiple of micro-batches of {training.micro_batch} on {training.gpus} "
            "GPUs"
        )
    return Job(name, mixer_of(name, shape), shape, training)
