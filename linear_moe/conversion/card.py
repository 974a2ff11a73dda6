"""The model card of an export: what the model is and how it was trained, from the arguments in its checkpoint."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from linear_moe import __version__
from linear_moe.conversion.config import dtype_name
from linear_moe.tokens import end_of_document

CODE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)"""

CODE_WITH_TOKENIZER = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({name})

inputs = tokenizer({prompt}, return_tensors="pt", add_special_tokens=False)
output = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(output[0]))"""

PROMPTS = """
In training, a document has no special token of its own and follows the end-of-document token: encode a prompt with
`add_special_tokens=False`, and put that token (id {end}) before a prompt that starts a document.
"""

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
{front}tags:
{tags}- linear-attention
---

# {title}

{about} Decoding needs constant memory{except_attention}.

```python
{code}
```
{prompts}
{format}With `import mom_layers.hf` before, `AutoModelForCausalLM` loads the folder without `trust_remote_code`.

## Model

{model}

## Training

{training}

Written by linear-moe {version}{commit}.
"""

MEMORIES = """A causal language model whose token mixer is [Mixture-of-Memories](https://arxiv.org/abs/2502.13685):
every layer keeps several memory states and a router sends each token to a few of them."""
ONE_MEMORY = "A causal language model whose layers keep one memory state each, with the update rule {rule}."

FLA_FORMAT = """The weights are in the format of `fla.models.mom` of
[flash-linear-attention](https://github.com/fla-org/flash-linear-attention), which loads them too.
"""
FLA_ATTENTION = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "rope_theta", "window_size"}
"""Keys of softmax layers that FLA's models have too."""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says that no checkpoint holds. None and empty: the card leaves it out.

    Attributes:
        name: of the model, as on the Hugging Face hub: owner/model.
        license: an identifier of the hub, such as apache-2.0.
        languages: codes, such as en.
        datasets: names on the hub.
        commit: of the code that wrote the export, where that is a checkout.
    """

    name: str | None = None
    license: str | None = None
    languages: Sequence[str] = ()
    datasets: Sequence[str] = ()
    commit: str | None = None

    def front_matter(self) -> str:
        """The lines of the card's header."""
        lines = [f"license: {json.dumps(self.license)}"] if self.license else []
        for key, values in (("language", self.languages), ("datasets", self.datasets)):
            if values:
                lines += [f"{key}:", *(f"- {json.dumps(value)}" for value in values)]
        return "".join(f"{line}\n" for line in lines)


def model_card(
    args: Namespace, iteration: int, config: dict, parameters: int, dtype: str, tokenizer, facts: CardFacts
) -> str:
    """README.md of an export.

    Args:
        args: stored in the checkpoint. Names of data and tokenizer appear without the paths that led to them.
        iteration: of the checkpoint; 0 for one that was not trained by Megatron.
        config: its config.json.
        parameters: their number.
        dtype: the type most of them are stored in.
        tokenizer: the one that lies beside the weights, or None.
        facts: what the command line says.
    """
    code = CODE if tokenizer is None else CODE_WITH_TOKENIZER
    end = None if tokenizer is None else end_of_document(tokenizer)
    routed = config["num_memories"] > 0
    prompt = "Once upon a time" if end is None else f"{tokenizer.convert_ids_to_tokens(end)}Once upon a time"
    return TEMPLATE.format(
        front=facts.front_matter(),
        tags="- mom\n- mixture-of-memories\n- arxiv:2502.13685\n" if routed else "",
        title=facts.name or f"{'Mixture-of-Memories' if routed else config['mom_backend']} language model",
        about=MEMORIES if routed else ONE_MEMORY.format(rule=config["mom_backend"]),
        version=__version__,
        commit=f", commit {facts.commit}" if facts.commit else "",
        except_attention=", but for its softmax layers' cache" if config["attn"] else "",
        format=FLA_FORMAT if routed and _fla_has(config) else "",
        code=code.format(name=json.dumps(facts.name or "."), prompt=json.dumps(prompt)),
        prompts="" if end is None else PROMPTS.format(end=end),
        model=_table(_model_facts(config, parameters, dtype)),
        training=_table(_training_facts(args, iteration)) if iteration else "Converted, not trained further.",
    )


def _table(facts: list[tuple[str, object]]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


def _model_facts(config: dict, parameters: int, dtype: str) -> list[tuple[str, object]]:
    attention = _attention_entries(config)
    softmax = sorted(layer for entry in attention for layer in entry["layers"] if layer < config["num_hidden_layers"])
    shared = " and a shared one" if config["shared_mem"] else ""
    routed = config["num_memories"] > 0
    return [
        ("parameters", f"{parameters:,} ({dtype})"),
        ("layers", config["num_hidden_layers"]),
        ("softmax attention layers", ", ".join(map(str, softmax)) or None),
        ("hidden size", config["hidden_size"]),
        ("MLP size", config["intermediate_size"]),
        ("experts", _experts(config["moe"]) if config["moe"] else None),
        ("layers of multi-token prediction", config["num_nextn_predict_layers"] or None),
        ("memories", f"{config['num_memories']}{shared}, {config['topk']} chosen by a token" if routed else "1"),
        (
            "memory heads",
            f"{config['num_heads']} of {config['head_dim']} x {config['head_dim'] * config['expand_v']:g}",
        ),
        ("update rule", config["mom_backend"]),
        ("vocabulary", config["vocab_size"]),
        ("embedding and output tied", "yes" if config["tie_word_embeddings"] else "no"),
    ]


def _attention_entries(config: dict) -> list[dict]:
    attention = config["attn"] or []
    return [attention] if isinstance(attention, dict) else attention


def _fla_has(config: dict) -> bool:
    """Whether FLA's models have every part of the model."""
    plain = all(entry.keys() <= FLA_ATTENTION and entry["rope_theta"] for entry in _attention_entries(config))
    return plain and config["moe"] is None and not config["num_nextn_predict_layers"]


def _experts(moe: dict) -> str:
    shared = moe.get("shared_expert_intermediate_size")
    return (
        f"{moe['num_experts']} of size {moe['intermediate_size']}, {moe['num_experts_per_tok']} chosen by a token"
        + (f", and a shared one of size {shared}" if shared else "")
        + f", in {len(moe['layers'])} layers"
    )


def _training_facts(args: Namespace, iteration: int) -> list[tuple[str, object]]:
    def get(name: str):
        return getattr(args, name, None)

    samples, length = get("consumed_train_samples"), get("seq_length")
    sizes = [
        f"{label} {get(name)}"
        for label, name in (
            ("tensor", "tensor_model_parallel_size"),
            ("pipeline", "pipeline_model_parallel_size"),
            ("expert", "expert_model_parallel_size"),
            ("data", "data_parallel_size"),
        )
        if (get(name) or 1) > 1
    ]
    return [
        ("framework", "Megatron (megatron.training)"),
        ("data", ", ".join(data_names(args)) or None),
        ("tokenizer", PurePath(get("tokenizer_model")).name if get("tokenizer_model") else get("tokenizer_type")),
        ("iterations", f"{iteration:,}"),
        ("tokens seen", f"{samples * length:,}" if samples and length else None),
        ("sequence length", length),
        ("batch", f"{get('global_batch_size')} sequences" if get("global_batch_size") else None),
        ("learning rate", _learning_rate(args)),
        ("optimizer", _optimizer(args)),
        ("load-balancing loss coefficient", get("mom_aux_loss_coeff")),
        ("precision", dtype_name(args.params_dtype) if get("params_dtype") is not None else None),
        ("parallel layout", ", ".join(sizes) or "one device"),
    ]


def _learning_rate(args: Namespace) -> str | None:
    if getattr(args, "lr", None) is None:
        return None
    text = f"{args.lr:g} to {getattr(args, 'min_lr', None) or 0:g}, {getattr(args, 'lr_decay_style', 'constant')}"
    for option, unit in (("lr_warmup_iters", "iterations"), ("lr_warmup_samples", "samples")):
        if warmup := getattr(args, option, None):
            text += f", warm-up {warmup:,} {unit}"
    return text


def _optimizer(args: Namespace) -> str | None:
    name = getattr(args, "optimizer", None)
    if name != "adam":
        return name
    return f"AdamW, betas {args.adam_beta1:g} and {args.adam_beta2:g}, weight decay {args.weight_decay:g}"


def data_names(args: Namespace) -> list[str]:
    """Names of the data sets that a run trained on, without the folders they lie in."""
    if getattr(args, "mock_data", False):
        return ["mock data"]
    paths: list[str] = []
    for option in ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path"):
        value = getattr(args, option, None) or []
        paths += [value] if isinstance(value, str) else value
    names = [PurePath(path).name for path in paths if not _is_weight(path)]
    return list(dict.fromkeys(names))


def _is_weight(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
