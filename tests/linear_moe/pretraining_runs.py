"""Small pretraining runs in processes of their own, as a user starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TINY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 2 --global-batch-size 4 --vocab-size 127 --make-vocab-size-divisible-by 64 --swiglu "
    "--tokenizer-type NullTokenizer --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--attention-dropout 0 --hidden-dropout 0 --lr 1e-2 --log-interval 1 --eval-iters 1 --eval-interval 100 "
    "--no-create-attention-mask-in-dataloader"
).split()
MOM = "--token-mixer mom --mom-num-heads 2 --mom-head-dim 16".split()


def pretrain(*arguments, processes=1, timeout=200) -> subprocess.CompletedProcess:
    """Runs linear_moe.pretrain to its end; stdout and stderr come back as one text."""
    return run_python("-m", "linear_moe.pretrain", *arguments, processes=processes, timeout=timeout)


def run_python(*words, processes=1, timeout=200, environment=None) -> subprocess.CompletedProcess:
    """Runs a module (`-m name`) or a script with its arguments, under torchrun where there are several processes."""
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += map(str, words)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (environment or {})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        command, cwd=ROOT, env=environment, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def losses(run: subprocess.CompletedProcess) -> dict[int, str]:
    """Step -> training loss, as the console shows it."""
    return dict((int(step), loss) for step, loss in re.findall(r"^step +(\d+)/.*? loss ([\d.naif]+)", run.stdout, re.M))
