"""Between Megatron's checkpoints and the Hugging Face format: what tools/convert_*.py and tools/generate.py do."""
