"""Evaluation of a Megatron checkpoint by Megatron's own forward pass, in any layout of processes.

The checkpoint's layout does not matter: Megatron loads the tensors into the layout of this run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from linear_moe.conversion.files import load_tokenizer
from linear_moe.evaluation.harness import Backend, EvaluationError
from linear_moe.tokens import vocabulary_size


class MegatronBackend(Backend):
    """A checkpoint as Megatron loads it.

    Args:
        load: folder of checkpoints, or of a single one.
        rows: micro-batch size, the rows side by side on a rank.
        words: further arguments of Megatron, such as ``--tensor-model-parallel-size 2``.
        dtype: float32, bfloat16 or float16.
        tokenizer: folder of another tokenizer than the checkpoint's.
        iteration: of the checkpoint; the latest when None.

    Raises:
        EvaluationError: the layout or the model cannot be evaluated.
        ConversionError: the tokenizer cannot be used.
    """

    def __init__(
        self,
        load: Path,
        rows: int,
        words: list[str],
        dtype: str,
        tokenizer: Path | None = None,
        iteration: int | None = None,
    ):
        from linear_moe.entry.machine import add_machine_defaults, prepare_machine

        prepare_machine()
        from megatron.core import mpu
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training import get_args
        from megatron.training.arguments import parse_and_validate_args
        from megatron.training.checkpointing import load_checkpoint
        from megatron.training.initialize import initialize_megatron

        from linear_moe.entry import arguments
        from linear_moe.entry.model import model_config

        arguments.PATCH.apply()
        sys.argv = [sys.argv[0], *megatron_words(load, rows, words, dtype, iteration)]
        parse_and_validate_args(extra_args_provider=add_machine_defaults)
        args = get_args()
        if args.context_parallel_size > 1 or args.virtual_pipeline_model_parallel_size is not None:
            raise EvaluationError(
                "evaluation runs with tensor, sequence, expert, pipeline and data parallelism: leave out "
                "--context-parallel-size and virtual pipeline stages, which a checkpoint does not need"
            )
        args.contiguous_context_slices = False
        initialize_megatron()
        folder = tokenizer or Path(args.tokenizer_model or "")
        self.tokenizer = load_tokenizer(folder)
        self.vocabulary = vocabulary_size(self.tokenizer)
        config = model_config(args)
        self.models = config.get_builder_cls()(config).build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            wrap_with_ddp=False,
            data_parallel_random_init=False,
        )
        load_checkpoint(self.models, None, None)
        for model in self.models:
            model.eval()
        self.args, self.mpu = args, mpu
        self.train_length = args.seq_length
        self.ranks, self.rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        self.is_first = torch.distributed.get_rank() == 0
        self.multiple = args.tensor_model_parallel_size if args.sequence_parallel else 1

    @torch.no_grad()
    def reduce(
        self, tokens: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """All ranks of the model compute; the last pipeline stage has the logits and sends the result to the others."""
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        rows, read = tokens.shape
        length = -(-read // self.multiple) * self.multiple
        tokens = torch.nn.functional.pad(tokens, (0, length - read)).cuda()
        positions = torch.arange(length, device=tokens.device).expand(rows, length)
        mask = None
        if self.args.create_attention_mask_in_dataloader:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)

        def result(logits, non_loss_data=True):
            whole = gather_from_tensor_model_parallel_region(logits)
            return function(whole[:, :read, : self.vocabulary].float())

        def step(_, model):
            return model(tokens, positions, mask), result

        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=self.models if len(self.models) > 1 else self.models[0],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=rows,
            decoder_seq_length=length,
            forward_only=True,
            collect_non_loss_data=True,
        )
        values = results[0].float() if results else torch.empty(shape, device=tokens.device)
        if self.mpu.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                values, self.mpu.get_pipeline_model_parallel_last_rank(), self.mpu.get_pipeline_model_parallel_group()
            )
        return values.cpu()

    def gather(self, values: list) -> list[list]:
        if self.ranks == 1:
            return [values]
        every: list = [None] * self.ranks
        torch.distributed.all_gather_object(every, values, group=self.mpu.get_data_parallel_group())
        return every


def megatron_words(load: Path, rows: int, words: list[str], dtype: str, iteration: int | None) -> list[str]:
    """The command line that loads a checkpoint's model, and nothing else of the checkpoint."""
    given = [
        "--load", str(load), "--use-checkpoint-args", "--exit-on-missing-checkpoint", "--no-load-optim",
        "--no-load-rng", "--micro-batch-size", str(rows), "--train-iters", "1", "--lr", "1e-4", "--mock-data",
        "--eval-iters", "0",
    ]  # fmt: skip
    given += {"bfloat16": ["--bf16"], "float16": ["--fp16"], "float32": []}[dtype]
    given += ["--ckpt-step", str(iteration)] if iteration is not None else []
    return [*given, *words]
