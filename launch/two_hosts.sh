#!/usr/bin/env bash
# Run a job on two private "hosts" of this machine: network namespaces that one cable (a veth pair) joins, each with processes,
# host name and /dev/shm of its own. What crosses between them is in the cable's own counters, with no other traffic.
#
#   launch/two_hosts.sh RANKS_PER_HOST SCRIPT [ARGUMENT ...]      as root, with iproute2
#   launch/two_hosts.sh 2 launch/bench.py comm
#
# torchrun starts the ranks (no sshd is needed) and they meet at 10.77.0.1, which exists inside the namespaces only.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,8s/^#\( \|$\)//p' "$0" >&2
    exit 2
fi
if [ "$(id -u)" != 0 ] || ! command -v ip >/dev/null; then
    echo "two_hosts.sh: error: network namespaces need root and the command ip (apt-get install iproute2)" >&2
    exit 2
fi

ranks_per_host=$1
shift
declare -A pid

cleanup() { # unshare ignores SIGTERM; its end takes the whole host down (--kill-child)
    for host in a b; do
        if [ -n "${pid[$host]:-}" ]; then kill -KILL "${pid[$host]}" 2>/dev/null || true; fi
        ip netns del "bitfleet-$host-$$" 2>/dev/null || true
    done
}
trap cleanup EXIT
trap 'exit 130' INT TERM

for host in a b; do ip netns add "bitfleet-$host-$$"; done
ip link add veth0 netns "bitfleet-a-$$" type veth peer name veth0 netns "bitfleet-b-$$"
ip -n "bitfleet-a-$$" addr add 10.77.0.1/24 dev veth0
ip -n "bitfleet-b-$$" addr add 10.77.0.2/24 dev veth0
for host in a b; do
    ip -n "bitfleet-$host-$$" link set lo up
    ip -n "bitfleet-$host-$$" link set veth0 up
done

# What runs inside a host: $1 is its name, the rest the command.
read -r -d '' inside <<'EOF' || true
hostname "bitfleet-$1"
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
shift
exec "$@"
EOF

node_rank=0
for host in a b; do
    GLOO_SOCKET_IFNAME=veth0 NCCL_SOCKET_IFNAME=veth0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
        ip netns exec "bitfleet-$host-$$" \
        unshare --pid --fork --kill-child --mount --mount-proc --uts --ipc \
        bash -euc "$inside" inside "$host" \
        python3 -m torch.distributed.run --nnodes 2 --node-rank "$node_rank" --nproc-per-node "$ranks_per_host" \
        --master-addr 10.77.0.1 --master-port 29500 "$@" &
    pid[$host]=$!
    node_rank=1
done

# The first host that fails ends the job; the other gets some seconds to say what it saw.
code=0
wait -n || code=$?
for _ in $(seq 15); do
    if [ "$code" = 0 ] || [ -z "$(jobs -rp)" ]; then break; fi
    sleep 1
done
if [ "$code" = 0 ]; then wait -n || code=$?; fi
exit "$code"
