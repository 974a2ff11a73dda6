"""Fine-tunes an exported Mixture-of-Memories model with LoRA, by PEFT and TRL, and merges the adapters.

    pip install peft trl datasets
    python examples/finetune_lora.py --load runs/demo/hf --text README.md docs --output runs/demo/tuned

With the demo's export this takes about a minute on a CPU. --load is any folder in the Hugging Face format: an export of
`linear-moe convert-to-hf`, or a model of flash-linear-attention. The merged model has the same format:
`linear-moe generate` reads the folder, and `linear-moe convert-from-hf` makes a Megatron checkpoint of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from mom_layers.hf import save_remote_code  # the import makes the Auto classes load Mixture-of-Memories models


def read_texts(paths: list[Path]) -> list[str]:
    """The texts of files, and of the .md, .txt and .py files of folders. Raises ValueError where there is no text."""
    files = []
    for path in paths:
        files += sorted(f for f in path.rglob("*") if f.suffix in (".md", ".txt", ".py")) if path.is_dir() else [path]
    texts = [text for file in files if (text := file.read_text(encoding="utf-8").strip())]
    if not texts:
        raise ValueError(f"--text {' '.join(map(str, paths))}: no text in these files and folders")
    return texts


def main(argv: list[str] | None = None) -> list[float]:
    """Runs the example. Returns the losses of the log."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--load", type=Path, required=True, help="folder of an export, with a tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files and folders of text to train on")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model")
    parser.add_argument("--steps", type=int, default=30, help="training steps [%(default)s]")
    parser.add_argument("--batch", type=int, default=4, help="rows of packed documents a step [%(default)s]")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row [%(default)s]")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters [%(default)s]")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate [%(default)s]")
    args = parser.parse_args(argv)

    # The tokenizer's end-of-document token follows every document, as in training.
    tokenizer = AutoTokenizer.from_pretrained(args.load)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    documents = Dataset.from_dict({"text": read_texts(args.text)})
    model = AutoModelForCausalLM.from_pretrained(args.load, dtype="auto")
    # "all-linear" reaches every projection of every memory, and not the convolutions and the output norm, whose weights
    # the kernels read. A list of names works too: ["q_proj", "k_proj", "v_proj", "o_proj"].
    adapters = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = SFTConfig(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        max_length=args.length,
        packing=True,  # documents share rows of tokens; the memories do not cross from one document to the next
        packing_strategy="bfd_split",  # a document longer than a row goes on in another row
        padding_free=True,
        learning_rate=args.lr,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = SFTTrainer(model, settings, train_dataset=documents, processing_class=tokenizer, peft_config=adapters)
    trainer.model.print_trainable_parameters()
    trainer.train()

    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    save_remote_code(args.output)  # so that the folder also loads where this package is not installed
    print(f"merged model: {args.output}")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
