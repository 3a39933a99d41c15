#!/usr/bin/env bash
# Run a job on private "hosts" of this machine: network namespaces on one switch, each with separate processes, host
# name and /dev/shm. The counters of a host's only cable (eth0) show what it sends, without other traffic.
#
#   launch/cluster/hosts.sh NUM_HOSTS RANKS_PER_HOST [--rate RATE] SCRIPT [ARGUMENT ...]      as root, with iproute2
#   launch/cluster/hosts.sh 2 2 -m bitfleet.launch bench comm
#   launch/cluster/hosts.sh 4 1 --rate 100mbit -m bitfleet.launch bench sharding --network xnornet
#
# RATE (in the notation of tc: 100mbit, 1gbit) limits every cable, in each direction; without it they are as fast as the
# machine copies. torchrun starts the ranks (no sshd is needed); they meet at 10.77.0.1, which exists only inside the
# namespaces.
set -euo pipefail

rate=
if [ "${3:-}" = --rate ]; then
    rate=${4:-}
    set -- "${1:-}" "${2:-}" "${@:5}"
fi
if [ $# -lt 3 ] || ! [[ "$1" =~ ^[1-9][0-9]?$ && "$2" =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,12s/^#\( \|$\)//p' "$0" >&2
    exit 2
fi
if [ "$(id -u)" != 0 ] || ! command -v ip >/dev/null; then
    echo "hosts.sh: error: network namespaces need root and the command ip (apt-get install iproute2)" >&2
    exit 2
fi

num_hosts=$1 ranks_per_host=$2
shift 2
switch=bitfleet-switch-$$
declare -A pid

cleanup() { # unshare ignores SIGTERM; its end ends the whole host (--kill-child)
    trap '' INT TERM # timeout(1) sends its signal twice
    for host in $(seq "$num_hosts"); do
        if [ -n "${pid[$host]:-}" ]; then kill -KILL "${pid[$host]}" 2>/dev/null || true; fi
        ip netns del "bitfleet-$host-$$" 2>/dev/null || true
    done
    ip netns del "$switch" 2>/dev/null || true
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# A bucket of 64 KB: a burst is 5 ms at 100 Mbit/s. Packets queue for up to 100 ms, then they are dropped.
shape() { # namespace, interface
    if [ -n "$rate" ]; then tc -n "$1" qdisc add dev "$2" root tbf rate "$rate" burst 64kb latency 100ms; fi
}

ip netns add "$switch"
ip -n "$switch" link add switch0 type bridge
ip -n "$switch" link set switch0 up
for host in $(seq "$num_hosts"); do
    space=bitfleet-$host-$$
    ip netns add "$space"
    ip link add eth0 netns "$space" type veth peer name "port$host" netns "$switch"
    ip -n "$switch" link set "port$host" master switch0 up
    ip -n "$space" addr add "10.77.0.$host/24" dev eth0
    ip -n "$space" link set lo up
    ip -n "$space" link set eth0 up
    shape "$space" eth0
    shape "$switch" "port$host"
done

# Script that runs inside a host: $1 is its name, the rest the command.
read -r -d '' inside <<'EOF' || true
hostname "bitfleet-$1"
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
shift
exec "$@"
EOF

for host in $(seq "$num_hosts"); do
    GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
        ip netns exec "bitfleet-$host-$$" \
        unshare --pid --fork --kill-child --mount --mount-proc --uts --ipc \
        bash -euc "$inside" inside "$host" \
        python3 -m torch.distributed.run --nnodes "$num_hosts" --node-rank "$((host - 1))" \
        --nproc-per-node "$ranks_per_host" --master-addr 10.77.0.1 --master-port 29500 "$@" &
    pid[$host]=$!
done

# The first host that fails ends the job; the others get 15 seconds to print their errors.
code=0
for _ in $(seq "$num_hosts"); do
    wait -n || code=$?
    if [ "$code" != 0 ]; then break; fi
done
if [ "$code" != 0 ]; then
    for _ in $(seq 15); do
        if [ -z "$(jobs -rp)" ]; then break; fi
        sleep 1
    done
fi
exit "$code"
