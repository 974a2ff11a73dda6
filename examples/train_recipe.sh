#!/usr/bin/env bash
# Trains a recipe of examples/recipes with pretrain_mom_a100.sh, whose settings (EP=2, OUT=..., DATA_PATH=...) and
# further arguments of Megatron work here too:
#   bash examples/train_recipe.sh linear_moe_a0.3b [--tiny] [ARGUMENTS]
# --tiny: the same kind of model with a few hundred thousand parameters, for a CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(bash "$here/tools/environment.sh")
export PYTHON PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m linear_moe.recipes "$@"
