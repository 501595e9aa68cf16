#!/bin/bash
# Within a job: a Ray cluster over its nodes for the length of COMMAND, which runs on the first of them.
#   on-ray.sh python -m pipelines.harmonise
# A token keeps everyone else's hands off it. The project and the data stand at the same path on all nodes.
set -u
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address_of() { getent ahostsv4 "$(scontrol show node "$1" --oneliner | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')" | awk 'NR == 1 {print $1}'; }
on() { node=$1; shift; srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@"; }

head=${nodes[0]} head_address=$(address_of "${nodes[0]}")
port=$((20000 + SLURM_JOB_ID % 10000))
folder=/tmp/ray-$SLURM_JOB_ID  # short: sockets stand in it
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ADDRESS=$head_address:$port
store=200000000  # bytes; tasks pass no volumes
options=(--block --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --object-store-memory=$store --dashboard-agent-listen-port=0)
if [ -n "${SLURM_MEM_PER_NODE:-}" ]; then options+=(--memory=$((SLURM_MEM_PER_NODE * 1048576 * 9 / 10 - store))); fi  # SLURM counts MiB

on "$head" ray start --head --node-ip-address="$head_address" --port="$port" --include-dashboard=false --temp-dir="$folder" \
    --ray-client-server-port=$((port + 10000)) "${options[@]}" > /dev/null &
cluster=($!)
for _ in $(seq 240); do
    (exec 3<>"/dev/tcp/$head_address/$port") 2>/dev/null && break
    kill -0 "${cluster[0]}" 2>/dev/null || break
    sleep 0.5
done
for node in "${nodes[@]:1}"; do
    on "$node" ray start --address="$RAY_ADDRESS" --node-ip-address="$(address_of "$node")" "${options[@]}" > /dev/null &
    cluster+=($!)
done
on "$head" "$@"
status=$?
# Asked gently, Ray waits half a minute for work that is no more.
squeue --steps --noheader --jobs="$SLURM_JOB_ID" --format=%i | grep -E '\.[0-9]+$' | xargs --no-run-if-empty scancel --quiet --signal=KILL 2> /dev/null
wait
srun --overlap --ntasks-per-node=1 rm -rf "$folder"
exit $status
