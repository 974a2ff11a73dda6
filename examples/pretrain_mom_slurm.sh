#!/usr/bin/env bash
# Runs pretrain_mom_multinode.sh on the nodes of a Slurm job, one torchrun on each. From the repository's folder:
#   MODEL=1.3b DATA_PATH=/data/text TOKENIZER=/data/tokenizer \
#       sbatch --nodes 8 --gpus-per-node 8 --time 24:00:00 examples/pretrain_mom_slurm.sh
# Settings, and arguments after the script's name, are those of pretrain_mom_a100.sh. Shortly before the time limit, and when a preemption leaves
# time, the job saves a checkpoint, goes back into the queue and resumes; a killed job resumes from its last checkpoint.
#SBATCH --job-name=mom
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ] || [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    echo "error: not in a Slurm job: submit it with sbatch --nodes N --gpus-per-node G ${BASH_SOURCE[0]}" >&2
    echo "without Slurm use examples/pretrain_mom_multinode.sh on each node" >&2
    exit 2
fi
if [ ! -f examples/pretrain_mom_multinode.sh ]; then # sbatch runs a copy of this script, from elsewhere
    echo "error: $PWD is not the repository's folder: submit from there, or with sbatch --chdir" >&2
    exit 2
fi

if ! [[ "$SLURM_JOB_ID" =~ ^[1-9][0-9]*$ ]]; then # bash arithmetic would evaluate the name of a variable
    printf 'error: SLURM_JOB_ID=%q: use a whole number\n' "$SLURM_JOB_ID" >&2
    exit 2
fi
NNODES=$SLURM_NNODES
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
MOM_PYTHON=$(bash tools/environment.sh) # made once, not by every node
# torchrun would kill its ranks 30 seconds after SIGTERM, in the middle of a checkpoint. Slurm signals every process of
# a step, so that the ranks receive the signal without torchrun.
PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
export NNODES MASTER_ADDR MASTER_PORT MOM_PYTHON PET_SIGNALS_TO_HANDLE

ASKED_TO_STOP=75
export ASKED_TO_STOP
# shellcheck disable=SC2329  # srun runs it
on_node() {
    local asked=0 status=0
    export NODE_RANK=$SLURM_NODEID
    trap 'asked=1' TERM
    # Ignored below here, but for the ranks: Megatron's --exit-signal-handler saves and ends the training.
    (trap '' TERM && exec bash examples/pretrain_mom_multinode.sh "$@") || status=$?
    if [ "$status$asked$NODE_RANK" = 010 ]; then status=$ASKED_TO_STOP; fi
    return "$status"
}

echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $NNODES nodes, $MASTER_ADDR:$MASTER_PORT"
status=0
srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    bash -c "$(declare -f on_node); on_node \"\$@\"" on_node "$@" || status=$?
if [ "$status" = "$ASKED_TO_STOP" ]; then
    echo "asked to stop, saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
