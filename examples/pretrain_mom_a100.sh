#!/usr/bin/env bash
# Pretrains a Mixture-of-Memories language model. With nothing set:
#   CUDA devices   the MoM paper's 380M recipe on all of them; MODEL=1.3b or MODEL=7b for larger models
#   none, or DEMO=1   a model of a few million parameters, a few minutes on two CPU cores
# The script makes an environment, prepares data, trains, and draws the loss and the memories' load. The same command
# resumes.
# Any setting below can be given in the environment; arguments after the script go to Megatron as they are.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/run_lock.sh
. "$here/examples/run_lock.sh"

# Ends the script unless each named setting that is given matches. To be called before the setting is computed with:
# bash arithmetic evaluates names, and runs what stands in brackets after a name.
check() {
    local pattern=$1 expected=$2 name
    shift 2
    for name in "$@"; do
        if [ -n "${!name:-}" ] && ! [[ "${!name}" =~ ^($pattern)$ ]]; then
            printf 'error: %s=%q: use %s\n' "$name" "${!name}" "$expected" >&2
            exit 2
        fi
    done
}
check '[1-9][0-9]{0,5}' "a whole number from 1 to 999999" TP PP EP CP NNODES PROCESSES
check '[1-9][0-9]{0,8}' "a whole number from 1 to 999999999" LAYERS HIDDEN FFN HEADS HEAD_DIM SEQ_LENGTH MICRO_BATCH \
    GLOBAL_BATCH TRAIN_ITERS VOCAB MEMORIES TOPK ATTENTION_HEADS LOG_INTERVAL EVAL_INTERVAL SAVE_INTERVAL
check '0|[1-9][0-9]{0,5}' "a whole number from 0 to 999999" GPUS NODE_RANK
check '[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]' "a port from 1 to 65535" MASTER_PORT
check '0|1' "0 or 1" DEMO SP OVERLAP RECOMPUTE
check '380m|1\.3b|7b' "380m, 1.3b or 7b" MODEL
check '0|[1-9][0-9]{0,8}' "a number of tokens, or 0 for all" LOSS_CHUNK
check '([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?' "a number such as 3e-4" LR GPU_GB
check '0?\.[0-9]+([eE][-+]?[0-9]+)?|0|[0-9]+(\.[0-9]*)?[eE]-[0-9]+' "a share of the steps such as 0.01" WARMUP_FRACTION
check 'bf16|fp32' "bf16 or fp32" PRECISION

PYTHON=$(bash "$here/tools/environment.sh")
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m linear_moe.cli doctor --quiet # ends the script where packages are missing or too old
: "${PP:=1}" "${EP:=1}" "${CP:=1}" "${NNODES:=1}" "${MODEL:=380m}"
: "${GPUS:=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}"
if [ "$GPUS" != 0 ] && [ $((GPUS * NNODES % (${TP:-1} * PP * CP))) != 0 ]; then
    echo "error: TP=${TP:-1} x PP=$PP x CP=$CP does not divide GPUS=$GPUS x NNODES=$NNODES" >&2
    exit 2
fi
# On a CPU two processes of one thread are faster than one of two.
if [ "$GPUS" = 0 ]; then : "${PROCESSES:=$(($(nproc) > 1 ? 2 : 1))}"; else PROCESSES=$GPUS; fi
if [ "${DEMO:-0}" != 0 ] || [ "$GPUS" = 0 ]; then
    : "${OUT:=$here/runs/demo}" "${LAYERS:=4}" "${HIDDEN:=256}" "${FFN:=512}" "${HEADS:=2}" "${HEAD_DIM:=64}"
    : "${SEQ_LENGTH:=256}" "${MICRO_BATCH:=$((PROCESSES < 8 ? 8 / PROCESSES : 1))}" "${LR:=2e-3}" "${TRAIN_ITERS:=200}"
    : "${GLOBAL_BATCH:=$((MICRO_BATCH * PROCESSES))}"
    : "${VOCAB:=4096}" "${PRECISION:=fp32}" "${LOG_INTERVAL:=10}" "${EVAL_INTERVAL:=50}" "${SAVE_INTERVAL:=50}"
else
    : "${OUT:=$here/runs/mom-$MODEL}" "${HEAD_DIM:=256}" "${LR:=3e-4}"
    case "$MODEL" in
        380m) # 256 x 2048: 0.5M tokens a step, 15B in all
            : "${LAYERS:=24}" "${HIDDEN:=1024}" "${FFN:=2048}" "${HEADS:=4}" "${SEQ_LENGTH:=2048}" "${GLOBAL_BATCH:=256}"
            tokens=15000000000
            ;;
        1.3b) # 1.35B parameters at work for a token, 1.55B stored; 1024 x 2048 tokens: 2M a step, 100B in all
            : "${LAYERS:=24}" "${HIDDEN:=2048}" "${FFN:=5632}" "${HEADS:=4}" "${SEQ_LENGTH:=2048}" "${GLOBAL_BATCH:=1024}"
            tokens=100000000000
            ;;
        7b) # 6.9B parameters at work for a token, 8.0B stored; 1024 x 4096 tokens: 4M a step, 140B in all
            : "${LAYERS:=32}" "${HIDDEN:=4096}" "${FFN:=11008}" "${HEADS:=8}" "${SEQ_LENGTH:=4096}" "${GLOBAL_BATCH:=1024}"
            tokens=140000000000
            ;;
    esac
    : "${MEMORIES:=4}" "${TOPK:=2}" "${VOCAB:=32000}"
    if [ "$MODEL" = 380m ]; then
        : "${TP:=1}"
        if [ -z "${MICRO_BATCH:-}" ]; then # 9 GB and 3.9 GB a sequence of 2048: 4 fit in 40 GB, 8 in 80 GB
            MICRO_BATCH=$("$PYTHON" -c 'import sys, torch
gb = float(sys.argv[1] or torch.cuda.get_device_properties(0).total_memory / 1e9)
print(16 if gb > 120 else 8 if gb > 60 else 4)' "${GPU_GB:-}")
            replicas=$((GPUS * NNODES / (TP * PP * CP)))
            while [ "$MICRO_BATCH" -gt 1 ] && [ $((GLOBAL_BATCH % (MICRO_BATCH * replicas))) != 0 ]; do MICRO_BATCH=$((MICRO_BATCH / 2)); done
        fi
    elif [ -z "${TP:-}" ] || [ -z "${MICRO_BATCH:-}" ] || [ -z "${RECOMPUTE:-}" ]; then # what fits, computed from shapes
        fitting=$("$PYTHON" -m linear_moe.entry.fit --layers "$LAYERS" --hidden "$HIDDEN" --ffn "$FFN" --heads "$HEADS" \
            --head-dim "$HEAD_DIM" --memories "$MEMORIES" --topk "$TOPK" --sequence "$SEQ_LENGTH" --vocab "$VOCAB" \
            --gpus $((GPUS * NNODES)) --gpus-here "$GPUS" --global-batch "$GLOBAL_BATCH" --pipeline "$PP" --expert "$EP" \
            --context "$CP" ${GPU_GB:+--gpu-gb "$GPU_GB"} ${TP:+--tensor "$TP"} \
            ${MICRO_BATCH:+--micro-batch "$MICRO_BATCH"} ${RECOMPUTE:+--recompute "$RECOMPUTE"})
        for setting in $fitting; do declare "$setting"; done
    fi
    : "${TRAIN_ITERS:=$((tokens / (GLOBAL_BATCH * SEQ_LENGTH)))}"
    : "${PRECISION:=bf16}" "${LOG_INTERVAL:=10}" "${EVAL_INTERVAL:=500}" "${SAVE_INTERVAL:=1000}"
fi
: "${TP:=1}" "${SP:=$((TP > 1))}" "${RECOMPUTE:=0}"
if [ "$GPUS" != 0 ] && [ $((GPUS * NNODES % (TP * PP * CP))) != 0 ]; then
    echo "error: TP=$TP x PP=$PP x CP=$CP does not divide GPUS=$GPUS x NNODES=$NNODES" >&2
    exit 2
fi
# The logits of a very long sequence take more memory than the model: the loss then reads the sequence in chunks.
: "${LOSS_CHUNK:=$((SEQ_LENGTH > 131072 ? 16384 : 0))}"
: "${TOKEN_MIXER:=mom}" "${MEMORIES:=4}" "${TOPK:=2}" "${ATTENTION_HEADS:=$((HIDDEN / 64))}" "${WARMUP_FRACTION:=0.01}"
: "${OVERLAP:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29531}"
: "${DATA_PATH:=}" "${TOKENIZER:=}" "${WANDB_PROJECT:=}" "${CHECKPOINTS=$OUT/checkpoints}" # empty: none are kept

echo "settings:"
for name in PYTHON OUT MODEL GPUS PROCESSES NNODES NODE_RANK MASTER_ADDR MASTER_PORT TP SP PP EP CP OVERLAP TOKEN_MIXER LAYERS HIDDEN FFN HEADS \
    HEAD_DIM MEMORIES TOPK ATTENTION_HEADS SEQ_LENGTH MICRO_BATCH RECOMPUTE LOSS_CHUNK GLOBAL_BATCH TRAIN_ITERS LR WARMUP_FRACTION PRECISION \
    LOG_INTERVAL EVAL_INTERVAL SAVE_INTERVAL CHECKPOINTS DATA_PATH TOKENIZER VOCAB WANDB_PROJECT; do
    echo "  $name=${!name}"
done
if [ "$NODE_RANK" -ge "$NNODES" ]; then
    echo "error: NODE_RANK=$NODE_RANK with NNODES=$NNODES: use 0 to NNODES - 1" >&2
    exit 2
fi
if [ -n "$DATA_PATH" ] && [ -z "$TOKENIZER" ]; then
    printf 'error: DATA_PATH=%q needs TOKENIZER, the folder of the tokenizer that made the data\n' "$DATA_PATH" >&2
    exit 2
fi
# A name that starts with a dash would be taken for an option.
case "$OUT" in -*) OUT=./$OUT ;; esac
case "$CHECKPOINTS" in -*) CHECKPOINTS=./$CHECKPOINTS ;; esac
for name in OUT ${CHECKPOINTS:+CHECKPOINTS}; do
    if ! reason=$(mkdir -p "${!name}" 2>&1); then
        printf 'error: %s=%q cannot be a folder: %s\n' "$name" "${!name}" "${reason##*: }" >&2
        exit 1
    fi
    if [ "$NODE_RANK" = 0 ]; then take_lock "${!name}"; fi # the nodes of one run share the folder
done

reference=()
if [ -z "$DATA_PATH" ]; then # a corpus that every machine has: the Python installation's sources and documentation
    data="$here/runs/python-corpus-$VOCAB"
    if [ ! -f "$data/corpus.json" ]; then
        mkdir -p "$data"
        "$PYTHON" "$here/tools/demo_corpus.py" --output "$data/corpus.jsonl" --overwrite
        "$PYTHON" "$here/tools/preprocess_data.py" --input "$data/corpus.jsonl" --output "$data/corpus" \
            --train-tokenizer "$VOCAB" --validation-fraction 0.05 --overwrite
    fi
    TOKENIZER=${TOKENIZER:-$data/corpus-tokenizer}
    data_arguments=(--train-data-path "$data/corpus-train" --valid-data-path "$data/corpus-valid")
    entropy=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["unigram_entropy_nats"])' "$data/corpus.json")
    reference=(--reference-loss "$entropy" "unigram entropy")
else
    prefixes=("$DATA_PATH")
    if ! [ -e "$DATA_PATH.bin" ] && ! [ -e "$DATA_PATH.idx" ]; then # a blend: weight prefix weight prefix ...
        read -r -d '' -a prefixes <<<"$DATA_PATH" || true
    fi
    data_arguments=(--data-path "${prefixes[@]}" --split 99,1,0)
fi

model=(
    --token-mixer "$TOKEN_MIXER" --mom-num-memories "$MEMORIES" --mom-topk "$TOPK" --mom-shared-memory
    --mom-num-heads "$HEADS" --mom-head-dim "$HEAD_DIM" --mom-aux-loss-coeff 1e-3
    --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN" --swiglu
    --num-attention-heads "$ATTENTION_HEADS" --position-embedding-type rope
    --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
)
training=(
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$TRAIN_ITERS"
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.01 --clip-grad 1.0
    --lr "$LR" --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-fraction "$WARMUP_FRACTION" --use-distributed-optimizer
)
if [ "$PRECISION" = bf16 ]; then training+=(--bf16); fi
if [ "$RECOMPUTE" != 0 ]; then training+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1); fi
if [ "$LOSS_CHUNK" != 0 ]; then training+=(--mom-loss-chunk "$LOSS_CHUNK"); fi
# Python's garbage collector stops each rank at another time, and the others wait: all ranks collect in the same step.
if [ $((PROCESSES * NNODES)) -gt 1 ]; then training+=(--manual-gc --manual-gc-interval 100); fi
parallel=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --expert-model-parallel-size "$EP"
    --context-parallel-size "$CP"
)
if [ "$SP" != 0 ]; then parallel+=(--sequence-parallel); fi
if [ "$OVERLAP" != 0 ] && [ "$GPUS" != 0 ] && [ $((GPUS * NNODES)) -gt $((TP * PP * CP)) ]; then # several replicas: hide what they exchange
    parallel+=(--overlap-grad-reduce --overlap-param-gather)
fi
watching=(
    --log-interval "$LOG_INTERVAL" --tensorboard-dir "$OUT/tensorboard" --tensorboard-log-interval "$LOG_INTERVAL"
    --eval-interval "$EVAL_INTERVAL" --eval-iters 8 --exit-signal-handler
)
if [ -n "$CHECKPOINTS" ]; then
    watching+=(--save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval "$SAVE_INTERVAL" --dist-ckpt-optim-fully-reshardable)
fi
if [ -n "$WANDB_PROJECT" ]; then
    watching+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "$(basename "$OUT")" --wandb-save-dir "$OUT")
fi

# Megatron insists on one hardware queue for TP and CP; with several, other exchanges run beside the computation.
if [ $((TP * CP)) -gt 1 ] || [[ " $* " == *--tensor-model-parallel-size* || " $* " == *--context-parallel-size* ]]; then
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
fi
if [ "$GPUS" = 0 ]; then threads=$(($(nproc) / PROCESSES)) && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}; fi
status=0
run_to_end "$PYTHON" -m linear_moe.entry.launch --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --nproc-per-node "$PROCESSES" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    -m linear_moe.pretrain "${model[@]}" "${training[@]}" "${parallel[@]}" "${watching[@]}" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" --data-cache-path "$OUT/data-cache" \
    --no-create-attention-mask-in-dataloader --log-file "$OUT/log.txt" "${data_arguments[@]}" "$@" || status=$?
if [ "$status" != 0 ]; then exit "$status"; fi
if [ "$asked_to_stop" = 1 ]; then
    echo "stopped by SIGTERM: run again to resume"
    exit 0
fi

if [ "$NODE_RANK" = 0 ]; then
    "$PYTHON" "$here/tools/plot_run.py" --tensorboard-dir "$OUT/tensorboard" --output "$OUT" ${reference[@]+"${reference[@]}"}
    echo "pictures    $(ls "$OUT"/*.png | tr '\n' ' ')"
    if [ -n "$CHECKPOINTS" ]; then
        echo "checkpoint  $CHECKPOINTS"
        printf 'next:       %q %q --load %q --save %q\n' "$PYTHON" "$here/tools/convert_to_hf.py" "$CHECKPOINTS" "$OUT/hf"
    fi
fi
