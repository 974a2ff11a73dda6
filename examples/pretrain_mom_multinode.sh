#!/usr/bin/env bash
# Runs pretrain_mom_a100.sh on several nodes without a scheduler. Type the same command on each, with its own NODE_RANK:
#   NNODES=8 NODE_RANK=0 MASTER_ADDR=node0 MODEL=1.3b DATA_PATH=/data/text TOKENIZER=/data/tokenizer \
#       bash examples/pretrain_mom_multinode.sh
# MODEL is 380m, 1.3b (both the MoM paper's) or 7b (our choice, not trained yet). Settings, and arguments after the
# script's name, are those of pretrain_mom_a100.sh. Every node must see the same repository, data and OUT.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

declare -A meaning=(
    [NNODES]="number of nodes" [NODE_RANK]="0 on the first node, 1 on the next, and so on"
    [MASTER_ADDR]="host name or address of the node with NODE_RANK=0"
    [DATA_PATH]="path of the data that tools/preprocess_data.py wrote, without .bin"
    [TOKENIZER]="folder of the tokenizer that made the data"
)
missing=0
for name in NNODES NODE_RANK MASTER_ADDR DATA_PATH TOKENIZER; do
    if [ -z "${!name:-}" ]; then
        echo "error: set $name: ${meaning[$name]}" >&2
        missing=1
    fi
done
if [ "$missing" = 1 ]; then exit 2; fi
if ! [[ "$NNODES" =~ ^[1-9][0-9]*$ && "$NODE_RANK" =~ ^(0|[1-9][0-9]*)$ ]] || [ "$NODE_RANK" -ge "$NNODES" ]; then
    echo "error: NODE_RANK=$NODE_RANK with NNODES=$NNODES: use whole numbers, NODE_RANK from 0 to NNODES - 1" >&2
    exit 2
fi

case "${MODEL:=380m}" in
    380m | 1.3b | 7b) ;;
    *)
        echo "error: MODEL=$MODEL: use 380m, 1.3b or 7b" >&2
        exit 2
        ;;
esac
export NNODES NODE_RANK MASTER_ADDR DATA_PATH TOKENIZER MODEL
exec bash "$here/examples/pretrain_mom_a100.sh" "$@"
