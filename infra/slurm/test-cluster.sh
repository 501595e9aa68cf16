#!/bin/bash
# A real SLURM of two nodes on this machine, to try and test launchers without a cluster. It listens where this machine's name points:
# on loopback, where /etc/hosts or nss gives it 127.x.
#   infra/slurm/test-cluster.sh install            what it needs (Debian, Ubuntu; as root)
#   infra/slurm/test-cluster.sh up [FOLDER]        starts it; then `export SLURM_CONF=FOLDER/slurm.conf`
#   infra/slurm/test-cluster.sh down [FOLDER]      ends its jobs, then its processes by their ids
# FOLDER (default /tmp/lodbrain-slurm-$UID) holds all of it. Two cores pose as eight; the partition `high` pre-empts `batch`.
set -eu
PATH=$PATH:/usr/sbin:/sbin
PACKAGES="slurm-wlm slurmctld slurmd slurm-client munge"
START_S=30
fail() { echo "error: $*" >&2; exit 2; }

missing() { for program in munged slurmctld slurmd sbatch squeue; do command -v $program >/dev/null || { echo $program; return; }; done; }

install() {
    [ -n "$(missing)" ] || return 0
    line="apt-get install -y --no-install-recommends $PACKAGES"
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || fail "$(missing) is missing; \`sudo $line\` (Debian, Ubuntu) is wanted"
    echo "installing SLURM: $line"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive $line -qq; } >/dev/null 2>&1 || fail "\`$line\` did not work; run it to see why"
}

free_ports() {  # as many as asked for, of which nobody listens now
    port=$((20000 + $$ % 20000))
    for _ in $(seq "$1"); do
        while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
        echo $port; port=$((port + 1))
    done
}

configuration() {  # CONTROLLER_PORT NODE_PORT NODE_PORT
    node="NodeHostname=$host NodeAddr=$address CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
    cat <<CONF
ClusterName=lodbrain
SlurmctldHost=$host($address)
SlurmctldPort=$1
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
LaunchParameters=enable_nss_slurm
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=10
MessageTimeout=20
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=300
NodeName=n1 Port=$2 $node
NodeName=n2 Port=$3 $node
PartitionName=batch Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

up() {
    [ -z "$(missing)" ] || fail "$(missing) is missing; \`infra/slurm/test-cluster.sh install\` as root, or \`apt-get install $PACKAGES\`, is wanted"
    if is_up; then echo "already up: export SLURM_CONF=$SLURM_CONF"; return; fi
    host=$(hostname -s) address=$(getent ahostsv4 "$(hostname -s)" | awk 'NR == 1 {print $1}')
    [ -n "$address" ] || fail "this machine's name, $host, has no address; a line \`127.0.0.1 $host\` in /etc/hosts is wanted"
    stop
    rm -rf "$folder"
    mkdir -p "$folder"/{munge,state,spool/n1,spool/n2,run,log}
    chmod 755 "$folder" "$folder"/munge
    (umask 277; head -c 1024 /dev/urandom > "$folder"/munge/key)
    # shellcheck disable=SC2046
    configuration $(free_ports 3) > "$SLURM_CONF"
    trap 'stop' EXIT
    # --force: the socket may stand where this user alone comes to; nobody else runs jobs here
    munged --force --key-file="$folder"/munge/key --socket="$folder"/munge/socket --pid-file="$folder"/run/munged.pid \
        --log-file="$folder"/log/munged.log --seed-file="$folder"/munge/seed 2>> "$folder"/log/munged.log ||
        fail "munged did not start; see $folder/log/munged.log"
    slurmctld -c -i || fail "slurmctld did not start; see $folder/log/slurmctld.log"
    for node in n1 n2; do slurmd -N $node || fail "slurmd did not start; see $folder/log/slurmd.$node.log"; done
    until [ "$(sinfo --noheader --partition=batch --states=idle --format=%D 2>/dev/null)" = 2 ]; do
        [ $((START_S -= 1)) -gt 0 ] || fail "the nodes do not come up; see $folder/log"
        sleep 1
    done
    trap - EXIT
    case $address in 127.*) ;; *) echo "note: $host is $address, not loopback: SLURM listens there, behind munge" ;; esac
    echo "up: export SLURM_CONF=$SLURM_CONF"
}

is_up() { [ -f "$SLURM_CONF" ] && [ "$(scontrol ping 2>/dev/null | grep -c 'is UP')" = 1 ]; }

stop() {  # jobs first: a slurmstepd outlives its slurmd. Logs stay until the next `up`
    if is_up; then
        scancel --user="$(id -un)" 2>/dev/null || true
        for _ in $(seq 30); do [ -n "$(squeue --noheader 2>/dev/null)" ] || break; sleep 0.5; done
    fi
    for name in slurmd slurmctld munged; do
        for file in "$folder"/run/$name*.pid; do
            [ -f "$file" ] && pid=$(cat "$file") && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = $name ] || continue  # else the id is another's by now
            kill "$pid" 2>/dev/null || true
            for _ in $(seq 50); do alive "$pid" || break; sleep 0.1; done
            if alive "$pid"; then kill -9 "$pid"; fi
        done
    done
    rm -f "$SLURM_CONF"
}

alive() { state=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) && [ "${state%% *}" != Z ]; }

command=${1:-} folder=${2:-/tmp/lodbrain-slurm-$(id -u)}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
export SLURM_CONF=$folder/slurm.conf
case $command in
install) install ;;
up) up ;;
down) stop; echo "down" ;;
*) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
