#!/usr/bin/env bash
# Run on a SLURM cluster, one task per GPU. The job is requeued when it is preempted or out of time, and continues.
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --exclusive --time 8:00:00 launch/cluster/slurm.sh \
#       --config birealnet18_imagenet --data.root /data/imagenet --run_dir /shared/runs/birealnet18
#   sbatch --array 0-2 ... launch/cluster/slurm.sh ...    one run per index: its --seed; --run_dir gets "-0", "-1", ...
#
# Everything after the file goes to the run. Activate the Python environment before sbatch: the job inherits PATH.
# All nodes must share --run_dir. Without --exclusive pass --cpus-per-task: SLURM gives each task one core.
# `bitfleet launch --print slurm ...` prints the whole command.
#SBATCH --job-name=bitfleet
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

run_dir=
resume=auto
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --run_dir=* | --run-dir=*) run_dir=${1#*=} ;;
    --run_dir | --run-dir)
        run_dir=${2:-}
        shift
        ;;
    --resume=*) resume=${1#*=} ;;
    --resume)
        resume=${2:-}
        shift
        ;;
    *) arguments+=("$1") ;;
    esac
    [ $# -eq 0 ] || shift # after an option without its value there is nothing left
done
if [ -z "$run_dir" ]; then
    echo "slurm.sh: error: pass --run_dir: the requeued job must find its checkpoints" >&2
    exit 2
fi
if [ "$resume" != auto ]; then
    echo "slurm.sh: error: leave out --resume $resume: the requeued job would start there again, not where it stopped" >&2
    exit 2
fi
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    run_dir+=-$SLURM_ARRAY_TASK_ID
    arguments+=(--seed "$SLURM_ARRAY_TASK_ID")
fi
arguments+=(--run_dir "$run_dir" --resume auto)

# srun kills its tasks on SIGTERM, so the ranks get SIGUSR1 for both: they agree on a step, save and exit with 75.
signalled=
srun=
stop() {
    signalled=1
    if [ -n "$srun" ]; then kill -USR1 "$srun" 2>/dev/null || true; fi
}
trap stop USR1 TERM

# The ranks end within seconds of each other: --kill-on-bad-exit would turn their exit code 75 into the 137 of the last.
# --wait ends the rest a minute after the first, so the others do not wait for a rank that failed.
# --cpu-bind=none: bitfleet divides the cores of a node among its ranks.
srun --kill-on-bad-exit=0 --wait=60 --cpu-bind=none python -m bitfleet.launch.train "${arguments[@]}" &
srun=$!
if [ -n "$signalled" ]; then stop; fi # it came before the PID of srun was known
while :; do # a signal interrupts wait
    signalled=
    code=0
    wait "$srun" || code=$?
    [ -n "$signalled" ] || break
done

# A job that SLURM is ending (COMPLETING) is not brought back: scancel means it, and SLURM itself requeues what it
# preempts. One that its time limit ends is requeued.
if [ "$code" = 75 ]; then
    case $(squeue --noheader --jobs "$SLURM_JOB_ID" --format "%T %r" 2>/dev/null || true) in
    *TimeLimit | RUNNING* | "")
        echo "slurm.sh: the run saved its state and is requeued"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    *) echo "slurm.sh: the run saved its state; the job is not requeued here, as SLURM ends it (scancel, preemption)" ;;
    esac
fi
exit "$code"
