"""The models and the cases that :mod:`two_gpus` trains."""

from __future__ import annotations

from dataclasses import dataclass, field

STEPS = 6
MODEL = (
    "--token-mixer mom --mom-num-heads 2 --mom-head-dim 64 --num-layers 4 --hidden-size 128 --num-attention-heads 4 "
    "--ffn-hidden-size 256 --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope "
    "--normalization RMSNorm --disable-bias-linear --swiglu --untie-embeddings-and-output-weights --vocab-size 127 "
    "--make-vocab-size-divisible-by 64 --tokenizer-type NullTokenizer --seed 3 --init-method-std 0.1 "
    "--attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 8 --lr 1e-4 --adam-eps 1e-2 "
    "--lr-decay-iters 100 --log-interval 1 --eval-iters 0 --eval-interval 1000 --split 1,0,0 "
    "--no-create-attention-mask-in-dataloader --dist-ckpt-optim-fully-reshardable"
).split()


def words(text: str) -> list[str]:
    return text.split()


VIRTUAL = words("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1")
GRAPHS = words("--cuda-graph-impl local --no-check-for-nan-in-loss-and-grad")
DISTRIBUTED = words("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")
EP2 = words("--expert-model-parallel-size 2")
CP2 = words("--context-parallel-size 2")
RECOMPUTED = words("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
TP2 = words("--tensor-model-parallel-size 2 --sequence-parallel")
MUON = ("--bf16", "--optimizer", "muon")
FP16 = ("--fp16", "--initial-loss-scale", "131072", "--hysteresis", "1")
MEGATRON_FSDP = words("--use-megatron-fsdp --use-distributed-optimizer --ckpt-format fsdp_dtensor")

DOCUMENTS = "DOCUMENTS"
"""Stands for a data set of short documents. Other models train on Megatron's mock data, whose documents are long."""
BASES = {
    "dense": [],
    "experts": words(
        "--num-experts 4 --moe-ffn-hidden-size 128 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
        "--moe-grouped-gemm"
    ),
    "last layer has memories": words("--linear-attention-freq [0,0,0,1]"),
    "multi-token prediction": words("--mtp-num-layers 1"),
    "long sequences": words(
        "--num-layers 2 --seq-length 8192 --max-position-embeddings 8192 --micro-batch-size 1 --global-batch-size 2"
    ),
    "packed documents": words(f"--data-path {DOCUMENTS} --dataloader-inter-document-masking --micro-batch-size 1"),
}
"""Models: each is trained on one GPU, and gives its weights to its cases."""


@dataclass(frozen=True)
class Case:
    """A way of training on two GPUs.

    arguments: of the run on two GPUs.
    base: the model, a key of BASES.
    both: arguments of the run on one GPU too.
    resumes: whether the run is also saved at half and resumed.
    own_start: the run draws its weights, which are those of one GPU, because its checkpoints have another form.
    compared: whether the run has the losses of one GPU. Experts over ranks draw other weights, and in fp16 the number
        of skipped steps depends on the sizes of the ranks' gradients.
    gpu: why the case needs a GPU; empty where the case runs over gloo too.
    environment: variables of the run on two GPUs.
    """

    name: str
    arguments: list[str]
    base: str = "dense"
    both: tuple[str, ...] = ("--bf16",)
    resumes: bool = False
    own_start: bool = False
    compared: bool = True
    gpu: str = ""
    environment: dict[str, str] = field(default_factory=dict)


ONE_CONNECTION = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
CASES = [
    Case("data parallel, plain 16-bit optimizer", [], resumes=True),
    Case("data parallel, distributed optimizer with overlap", DISTRIBUTED, resumes=True),
    Case("data parallel, gradients reduced in bf16", ["--grad-reduce-in-bf16"]),
    Case("data parallel, distributed, gradients reduced in bf16", [*DISTRIBUTED, "--grad-reduce-in-bf16"]),
    Case("virtual pipeline, plain 16-bit optimizer", VIRTUAL, resumes=True),
    Case("virtual pipeline, distributed optimizer", [*VIRTUAL, "--use-distributed-optimizer"]),
    Case("virtual pipeline, distributed optimizer with overlap", [*VIRTUAL, *DISTRIBUTED]),
    Case("virtual pipeline, gradients reduced in bf16", [*VIRTUAL, "--grad-reduce-in-bf16"]),
    Case("memories over ranks, all-to-all", [*EP2, *DISTRIBUTED]),
    Case("memories over ranks, all-gather", [*EP2, *DISTRIBUTED, "--mom-expert-exchange", "all-gather"]),
    Case(
        "memories over ranks, peer memory", [*EP2, *DISTRIBUTED, "--mom-expert-exchange", "peer-memory"],
        gpu="GPUs read each other's memory",
    ),
    *(
        Case(
            f"memories over ranks, {exchange}, CUDA graphs of layers",
            [*EP2, "--use-distributed-optimizer", *GRAPHS, "--mom-expert-exchange", exchange],
            gpu="CUDA graphs",
        )
        for exchange in ("all-gather", "peer-memory")
    ),
    Case("sequences over ranks", [*CP2, *DISTRIBUTED]),
    Case("sequences over ranks, recomputed", [*CP2, *RECOMPUTED]),
    Case("sequences over ranks, slices in parts", CP2, base="long sequences"),
    Case("sequences over ranks, slices in parts, recomputed", [*CP2, *RECOMPUTED], base="long sequences"),
    Case("sequences over ranks, packed documents", CP2, base="packed documents"),
    Case("sequences over ranks, packed documents, recomputed", [*CP2, *RECOMPUTED], base="packed documents"),
    *(
        Case(f"sequences and memories over ranks, {exchange}", [*CP2, *EP2, "--mom-expert-exchange", exchange])
        for exchange in ("all-to-all", "all-gather")
    ),
    Case("experts, expert parallel", [*EP2, *DISTRIBUTED], base="experts"),
    Case(
        "experts, overlapped exchange, delayed weight gradients",
        [*EP2, *DISTRIBUTED, "--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"],
        base="experts", gpu="delayed weight gradients are Transformer Engine's",
        environment={"CUDA_DEVICE_MAX_CONNECTIONS": "32"},
    ),
    Case(
        "experts, overlapped exchange", [*EP2, *DISTRIBUTED, "--overlap-moe-expert-parallel-comm"],
        base="experts", environment={"CUDA_DEVICE_MAX_CONNECTIONS": "32"},
    ),
    Case("torch FSDP2", ["--use-torch-fsdp2"], resumes=True),
    Case(
        "Megatron FSDP, all sharded", [*MEGATRON_FSDP, "--data-parallel-sharding-strategy", "optim_grads_params"],
        resumes=True, own_start=True,
    ),
    Case(
        "Megatron FSDP, optimizer and gradients sharded",
        [*MEGATRON_FSDP, "--data-parallel-sharding-strategy", "optim_grads"], own_start=True,
    ),
    Case(
        "Megatron FSDP, optimizer sharded",
        [*MEGATRON_FSDP, "--data-parallel-sharding-strategy", "optim"], own_start=True,
    ),
    Case(
        "Megatron FSDP, experts",
        [*MEGATRON_FSDP, "--data-parallel-sharding-strategy", "optim_grads_params"], base="experts", own_start=True,
    ),
    Case(
        "Megatron FSDP, experts over ranks",
        [*MEGATRON_FSDP, "--data-parallel-sharding-strategy", "optim_grads_params", *EP2],
        base="experts", own_start=True, compared=False,
    ),
    Case(
        "activations of 2 layers offloaded", ["--cpu-offloading-num-layers", "2"],
        gpu="Transformer Engine offloads",
    ),
    Case("Muon", [], both=MUON, resumes=True),
    Case("Muon, layer-wise over ranks", ["--use-distributed-optimizer"], both=MUON, resumes=True),
    Case(
        "Muon, a pipeline stage without memories", words("--pipeline-model-parallel-size 2"),
        base="last layer has memories", both=MUON, resumes=True,
    ),
    Case("multi-token prediction, sequence parallel", TP2, base="multi-token prediction", environment=ONE_CONNECTION),
    Case("fp16, first steps skipped", DISTRIBUTED, both=FP16, resumes=True, compared=False),
]  # fmt: skip
