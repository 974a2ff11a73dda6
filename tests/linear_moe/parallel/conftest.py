import fcntl
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
import training

from mom_layers.recur.rules import rule_names

MODELS = {
    "shared memory, packed documents, distributed optimizer": [
        *["--dataloader-inter-document-masking", "--micro-batch-size", 1],  # pipelines take packed rows one by one
        *training.DISTRIBUTED_OPTIMIZER,
    ],
    "routed memories only": ["--no-mom-shared-memory"],
}
PACKED, ROUTED = MODELS
GLA = "gated linear attention"
ALONE = "gated deltanet alone, packed documents, distributed optimizer"
EXPERTS = "experts in the MLPs, distributed optimizer"
TEXT = "a convolution over the text, packed documents, distributed optimizer"
ARGUMENTS = MODELS | {
    GLA: ["--mom-rule", "gla"],
    ALONE: ["--token-mixer", "gated_deltanet", *MODELS[PACKED], "--lr", "5e-3"],
    TEXT: ["--mom-text-conv", 4, *MODELS[PACKED]],
    **{f"{rule} as memories": ["--mom-rule", rule] for rule in rule_names()},
    **{f"{rule} alone": ["--token-mixer", rule] for rule in rule_names()},
    EXPERTS: [
        *"--num-experts 4 --moe-ffn-hidden-size 32 --moe-router-topk 2 --moe-token-dispatcher-type alltoall".split(),
        *training.DISTRIBUTED_OPTIMIZER,
    ],
}

LAYOUTS = {
    "1": (1, []),
    "TP2": (2, training.TP2),
    "TP2+SP": (2, training.TP2 + training.SP),
    "PP2": (2, training.PP2),
    "DP2": (2, training.DISTRIBUTED_OPTIMIZER),
    "EP2": (2, training.EP2),
    "EP2, whole memories": (2, training.EP2 + training.WHOLE),
    "EP2, all-gather": (2, training.EP2 + training.ALL_GATHER),
    "CP2": (2, training.CP2),
    "CP2+EP2": (2, training.CP2 + training.EP2),
    "TP2+SP x PP2": (4, training.TP2 + training.SP + training.PP2),
    "TP2+SP+EP2": (4, training.TP2 + training.SP + training.EP2),
    "TP2+SP+EP2, all-gather": (4, training.TP2 + training.SP + training.EP2 + training.ALL_GATHER),
    "CP4": (4, training.CP4),
    "CP2+EP4": (4, training.CP2 + training.EP4),
    "CP2+EP4, all-gather": (4, training.CP2 + training.EP4 + training.ALL_GATHER),
    "CP2 x DP2": (4, training.CP2 + training.DISTRIBUTED_OPTIMIZER),
    "CP2 x PP2": (4, training.CP2 + training.PP2),
    "CP2+TP2": (4, training.CP2 + training.TP2),
    "CP2+TP2+SP": (4, training.CP2 + training.TP2 + training.SP),
}
ONE_RANK_AN_EXPERT = "TP2+SP+EP2, experts whole on a rank"
EXPERT_LAYOUTS = {
    ONE_RANK_AN_EXPERT: (2, training.TP2 + training.SP + training.EP2 + ["--expert-tensor-parallel-size", "1"])
}
"""Layouts of models with experts in the MLPs, which a model without experts cannot have."""
STEPS, SAVED = 10, 8


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="for machines without a GPU"))


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    return training.write_documents(tmp_path_factory.mktemp("documents") / "data")


def once(folder, train, *arguments):
    """train(folder, *arguments) -> losses, by the first worker that calls; other workers wait. And the folder."""
    folder.mkdir(exist_ok=True)
    result = folder / "losses.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            result.write_text(json.dumps(list(train(folder, *arguments).items())))
    return dict(json.loads(result.read_text())), folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, documents):
    """trained(layout, model) -> losses of ten steps, and the folder of checkpoints after one, eight and ten.

    Pipeline stages and experts draw their weights from seeds of their own, so those runs start from the weights of one
    process.
    """

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # every worker's

    @cache
    def initial_weights(model):
        return once(shared / f"initial {list(ARGUMENTS).index(model)}", train_initial, model)[1]

    def train_initial(folder, model):
        data = ["--data-path", documents, "--train-iters", 1]
        return training.launch(1, [*ARGUMENTS[model], *data, "--lr", 0], folder, save_at=(1,))

    @cache
    def run(layout, model):
        return once(shared / f"{layout} {list(ARGUMENTS).index(model)}", train, layout, model)

    def train(folder, layout, model):
        ranks, arguments = (LAYOUTS | EXPERT_LAYOUTS)[layout]
        start = []
        if "PP" in layout or model == EXPERTS:
            start = ["--load", initial_weights(model), "--finetune", "--no-load-optim", "--no-load-rng"]
        data = ["--data-path", documents, "--train-iters", STEPS]
        return training.launch(ranks, [*ARGUMENTS[model], *data, *arguments, *start], folder, save_at=(1, SAVED))

    return run
