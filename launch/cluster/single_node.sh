#!/usr/bin/env bash
# Run on all GPUs of this machine; the same command continues a stopped run:
#
#   launch/cluster/single_node.sh runs/birealnet18 --config birealnet18_imagenet --data.root /data/imagenet
#   RANKS=2 launch/cluster/single_node.sh runs/quick --config fashion_quickstart        (CPU ranks without GPUs)
#
# The first word is the run folder; the rest are options of the run. Ctrl-C, SIGTERM or closing the terminal saves, and
# ends with exit code 75.
set -euo pipefail

if [ $# -lt 2 ] || [[ $1 == -* ]]; then
    sed -n '2,8s/^#\( \|$\)//p' "$0" >&2
    exit 2
fi
run=$1
shift
exec bitfleet launch deepspeed ${RANKS:+--gpus "$RANKS"} --run_dir "$run" --resume auto "$@"
