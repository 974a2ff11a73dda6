"""Small pretraining runs in processes of their own, as a user starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import warm_python

ROOT = Path(__file__).parents[2]

TINY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 2 --global-batch-size 4 --vocab-size 127 --make-vocab-size-divisible-by 64 --swiglu "
    "--tokenizer-type NullTokenizer --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--attention-dropout 0 --hidden-dropout 0 --lr 1e-2 --log-interval 1 --eval-iters 1 --eval-interval 100 "
    "--no-create-attention-mask-in-dataloader"
).split()
MOM = "--token-mixer mom --mom-num-heads 2 --mom-head-dim 16".split()


def pretrain(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs linear_moe.pretrain to its end; stdout and stderr come back as one text."""
    return run_python("-m", "linear_moe.pretrain", *arguments, **options)


def run_python(
    *words, processes=1, environment=None, new_interpreter=False, timeout=200
) -> subprocess.CompletedProcess:
    """Runs a module (`-m name`) or a script with its arguments, under torchrun where there are several processes.

    new_interpreter: whether as from a shell, and not in a fork of a process that has imported Megatron.
    """
    environment = os.environ | warm_python.ENVIRONMENT | (environment or {})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.pop("TRITON_INTERPRET", None)
    if processes == 1 and not new_interpreter:
        return warm_python.run(*words, folder=ROOT, environment=environment, timeout=timeout)
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, *map(str, words)],
        cwd=ROOT, env=environment, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def losses(run: subprocess.CompletedProcess) -> dict[int, str]:
    """Step -> training loss, as the console shows it."""
    return dict((int(step), loss) for step, loss in re.findall(r"^step +(\d+)/.*? loss ([\d.naif]+)", run.stdout, re.M))
