# Keeps two runs out of one folder. Sourced by pretrain_mom_a100.sh; needs bash and Linux.
#
# FOLDER/.lock names the run at work there: "host gpu07 process 4711 started 812345 job none.0", where "started" is in
# ticks since the host did. A lock is stale when its process and all processes that this one started are dead, which
# only their own host can tell, or when Slurm has started the lock's job once more.

# When a process started, in ticks since the machine did. Fails for a dead process and for a zombie.
started() {
    local fields
    { fields=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
    read -r -a fields <<<"${fields##*) }" # what follows the command's name, which may hold blanks
    [ "${fields[0]}" != Z ] || return 1
    echo "${fields[19]}"
}

RUN_LOCK="host $(uname -n) process $$ started $(started $$) job ${SLURM_JOB_ID:-none}.${SLURM_RESTART_COUNT:-0}"
export RUN_LOCK # by which the processes of a run are found when its script is dead
locked=()

# Whether the run that wrote a lock of this text is over.
is_over() {
    local words job restart
    read -r -a words <<<"$1"
    [ "${#words[@]}" = 8 ] || return 1
    IFS=. read -r job restart <<<"${words[7]}"
    if [ "$job" != none ] && [ "$job" = "${SLURM_JOB_ID:-}" ] && [ "$restart" != "${SLURM_RESTART_COUNT:-0}" ]; then return 0; fi
    [ "${words[1]}" = "$(uname -n)" ] || return 1
    if [ "$(started "${words[3]}" || true)" = "${words[5]}" ]; then return 1; fi
    ! grep -qzxF -- "RUN_LOCK=$1" /proc/[0-9]*/environ 2>/dev/null
}

# Writes FOLDER/.lock, or ends the script with the reason why that cannot be.
take_lock() {
    local folder=$1 lock=$1/.lock holder reason judge
    if ! { exec {judge}<"$folder"; } 2>/dev/null; then
        echo "error: $folder cannot be read: give another folder, or its permissions" >&2
        exit 1
    fi
    # Of the runs of a host one at a time judges and replaces a lock. Some file systems cannot do that.
    flock "$judge" 2>/dev/null || true
    while ! reason=$(write_new "$lock" 2>&1); do
        if ! [ -f "$lock" ]; then
            case "$reason" in *"cannot overwrite"*) continue ;; esac # the other run has just ended
            echo "error: cannot write $lock: ${reason##*: }" >&2
            exit 1
        fi
        holder=$(cat -- "$lock" 2>/dev/null || true)
        if [ "$holder" = "$RUN_LOCK" ]; then break; fi
        if ! is_over "$holder"; then
            echo "error: $folder is in use by another run ($lock: ${holder:-empty}): give another OUT, or wait for that" \
                "run's end. If no such run is alive on that host, remove $lock" >&2
            exit 1
        fi
        echo "$folder was left locked by a run that is over ($holder)" >&2
        rm -f -- "$lock"
    done
    exec {judge}<&-
    locked+=("$lock")
    trap release_locks EXIT
}

# Creates the file, which must not exist, with this run's text, or leaves no file.
write_new() {
    set -o noclobber
    exec 3>"$1" || return 1
    if ! printf '%s\n' "$RUN_LOCK" >&3; then
        if [ -f "$1" ]; then rm -f -- "$1"; fi
        return 1
    fi
}

release_locks() {
    local lock
    for lock in ${locked[@]+"${locked[@]}"}; do
        if [ "$(cat -- "$lock" 2>/dev/null || true)" = "$RUN_LOCK" ]; then rm -f -- "$lock"; fi
    done
}

# Runs torchrun and returns its status. A signal does not end this shell, and release the locks, before torchrun has
# ended. A signal that reached this shell alone is passed on: SIGTERM to the ranks, which save and end. torchrun ignores
# SIGTERM, since it would kill the ranks 30 seconds later. Sets asked_to_stop to 1 after SIGTERM.
asked_to_stop=0
run_to_end() {
    local status
    # In the background, where a shell would start them with SIGINT ignored. The witness dies of what the whole process
    # group gets, and ends with this shell.
    coproc WITNESS { trap - INT QUIT; exec cat >/dev/null; }
    witness=$WITNESS_PID
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGINT,SIGHUP,SIGQUIT}
    (trap - INT QUIT; trap '' TERM; exec "$@") &
    at_work=$!
    trap 'pass_on INT "$at_work"' INT
    trap 'asked_to_stop=1; pass_on TERM $(cat /proc/"$at_work"/task/*/children 2>/dev/null)' TERM
    trap 'pass_on HUP "$at_work"' HUP
    while :; do
        status=0
        wait "$at_work" || status=$?
        kill -0 "$at_work" 2>/dev/null || break
    done
    trap - INT TERM HUP
    kill "$witness" 2>/dev/null || true
    return "$status"
}

pass_on() { # SIGNAL PROCESS...
    local number=$1 process
    shift
    sleep 0.2 # until the witness is dead, if the signal reached the witness
    kill -0 "$witness" 2>/dev/null || return 0
    for process in "$@"; do kill -s "$number" "$process" 2>/dev/null || true; done
}
