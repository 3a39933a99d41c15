#!/usr/bin/env bash
# A run on a SLURM cluster, a task for each GPU. It is requeued when it is preempted or its time is over, and continues.
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --exclusive --time 8:00:00 launch/cluster/slurm.sh \
#       --config birealnet18_imagenet --data.root /data/imagenet --run_dir /shared/runs/birealnet18
#   sbatch --array 0-2 ... launch/cluster/slurm.sh ...       a run for each index: --run_dir gets "-0", "-1", ... and the index is its --seed
#
# Everything after the file goes to the run. Activate the Python environment before sbatch: the job inherits PATH. The nodes share
# --run_dir. Without --exclusive say --cpus-per-task: SLURM gives a task one core. `bitfleet launch --print slurm ...` prints the
# whole command.
#SBATCH --job-name=bitfleet
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

run_dir=
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --run_dir=*) run_dir=${1#*=} ;;
    --run_dir)
        run_dir=${2:-}
        shift
        ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
if [ -z "$run_dir" ]; then
    echo "slurm.sh: error: pass --run_dir: the requeued job must find its checkpoints" >&2
    exit 2
fi
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    run_dir+=-$SLURM_ARRAY_TASK_ID
    arguments+=(--seed "$SLURM_ARRAY_TASK_ID")
fi
arguments+=(--run_dir "$run_dir" --resume auto)

# srun answers SIGTERM by killing its tasks, so the ranks get SIGUSR1 for either: they agree on a step, save and end with 75.
signalled=
srun=
stop() {
    signalled=1
    if [ -n "$srun" ]; then kill -USR1 "$srun" 2>/dev/null || true; fi
}
trap stop USR1 TERM

# The ranks end within seconds of each other, but not at once: --kill-on-bad-exit would turn their 75 into the 137 of the last.
# --wait ends the rest a minute after the first, so a rank that fails does not leave the others waiting.
# The ranks of a node share its cores (--cpu-bind=none): bitfleet divides them.
srun --kill-on-bad-exit=0 --wait=60 --cpu-bind=none python -m bitfleet.launch.train "${arguments[@]}" &
srun=$!
if [ -n "$signalled" ]; then stop; fi # it came before the number of srun was known
while :; do # a signal interrupts wait
    signalled=
    code=0
    wait "$srun" || code=$?
    [ -n "$signalled" ] || break
done

if [ "$code" = 75 ]; then
    echo "slurm.sh: the run saved its state and is requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
