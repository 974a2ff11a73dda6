"""What a process does once before it forks others that train: imports, and what each of them would do again. Nothing
of ours is imported.
"""

import gc
import logging
import warnings
from argparse import ArgumentParser
from functools import cache

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import megatron.core.datasets.blended_megatron_dataset_builder  # noqa: E402
import megatron.core.datasets.gpt_dataset  # noqa: E402
import megatron.core.tokenizers.text.libraries  # noqa: E402
import megatron.training.training  # noqa: E402, F401
import torch.utils.cpp_extension  # noqa: E402, F401
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402
from torch._dynamo.trace_rules import get_torch_obj_rule_map  # noqa: E402


def keep_help_texts() -> None:
    """Reads the help texts of Megatron's arguments from its sources here, and not in every fork."""
    reader = object.__new__(ArgumentGroupFactory)
    read = ArgumentGroupFactory._get_field_docstrings
    kept = cache(lambda config: read(reader, config))
    ArgumentGroupFactory._get_field_docstrings = lambda self, config: kept(config)
    add_megatron_arguments(ArgumentParser())


keep_help_texts()
get_torch_obj_rule_map()  # Dynamo's table of functions
logging.disable(logging.NOTSET)
gc.collect()
gc.freeze()  # collections of the forks leave what is here alone: they would copy all of its memory
