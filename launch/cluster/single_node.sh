#!/usr/bin/env bash
# A run on all GPUs of this machine, which continues where it was stopped:
#
#   launch/cluster/single_node.sh runs/birealnet18 --config birealnet18_imagenet --data.root /data/imagenet
#   RANKS=2 launch/cluster/single_node.sh runs/quick --config fashion_quickstart        (CPU ranks, where there is no GPU)
#
# The first word is the run folder; the rest are options of the run. The same command again continues it. Ctrl-C, SIGTERM or
# closing the terminal saves and ends with exit code 75.
set -euo pipefail

if [ $# -lt 3 ] || [[ $1 == -* ]]; then
    sed -n '2,8s/^#\( \|$\)//p' "$0" >&2
    exit 2
fi
run=$1
shift
exec bitfleet launch deepspeed ${RANKS:+--gpus "$RANKS"} --run_dir "$run" --resume auto "$@"
