#!/usr/bin/env bash
# A real SLURM cluster of virtual nodes n1, n2 ... on this machine, for tests: as root, on Debian or Ubuntu, without
# systemd, cgroups or docker. Everything lies in LAB_DIR; all daemons listen on loopback.
#
#   cluster.sh up                  installs what is missing, starts a cluster anew (ending one in the same LAB_DIR)
#                                  and waits until its nodes are idle
#   cluster.sh install             only the first of these
#   cluster.sh kill-node nX [now]  cuts a node's power: its daemon and all its jobs' processes are gone when this
#                                  returns; with `now` slurmctld is told, else it finds out after SlurmdTimeout
#   cluster.sh start-node nX       gives it power again, once slurmctld has found out, and waits until it takes jobs
#   cluster.sh stop                ends what `up` started and leaves its logs
#   cluster.sh clean               the same, and removes all that it wrote
#   cluster.sh env                 for a shell: eval "$(cluster.sh env)"
set -euo pipefail

LAB_DIR=${LAB_DIR:-${TMPDIR:-/tmp}/seer-scale-slurm}
NODES=${NODES:-4}
CPUS=${CPUS:-16} # a node, pretended, as are
GPUS=${GPUS:-8}
SLURMCTLD_PORT=${SLURMCTLD_PORT:-26817}
SLURMD_PORT=${SLURMD_PORT:-27100} # nX listens on SLURMD_PORT + X

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MARK=$LAB_DIR/.seer-scale-slurm # without it a folder is not ours to remove
RUN=$LAB_DIR/run LOG=$LAB_DIR/log
SOCKET=$RUN/munge.socket
HOSTS_MARK="# seer-scale-slurm $LAB_DIR/"
export SLURM_CONF=$LAB_DIR/slurm.conf

die() { echo "cluster.sh: $*" >&2; exit 1; }

# ---------------------------------------------------------------------------------------------- processes

# ours PID: it lives and serves this lab. A recycled pid does not, and a zombie has no command line.
ours() { grep -qsaF -- "$LAB_DIR/" "/proc/$1/cmdline"; }

# end PID_FILE SIGNAL SECONDS: then SIGKILL. Read once: slurmctld removes its file early in its shutdown.
end() {
  local pid i
  [[ -s $1 ]] || return 0
  pid=$(<"$1")
  if ours "$pid"; then
    kill "-$2" "$pid" || true
    for ((i = 0; i < $3 * 20; i++)); do ours "$pid" || break; sleep 0.05; done
    if ours "$pid"; then kill -KILL "$pid" || true; fi
  fi
  rm -f "$1"
}

# wait_for SECONDS WORDS...: until the words, run as a command, succeed
wait_for() {
  local until=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < until)) || { tail -n 20 "$LOG"/*.log >&2; die "waited in vain for: $*"; }
    sleep 0.1
  done
}

# ---------------------------------------------------------------------------------------------- set-up

install_packages() {
  local missing=() made=
  command -v munged >/dev/null || missing+=(munge)
  command -v slurmctld >/dev/null || missing+=(slurmctld)
  command -v slurmd >/dev/null || missing+=(slurmd)
  command -v srun >/dev/null || missing+=(slurm-client)
  ((${#missing[@]})) || return 0
  if [[ ! -e /usr/sbin/policy-rc.d ]]; then # else the packages start daemons of their own
    made=/usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$made"
    chmod 755 "$made"
  fi
  apt() { DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::http::Timeout=20 "$@" >&2; }
  apt update || true # the lists there may do
  apt install -y --no-install-recommends "${missing[@]}" || die "apt-get cannot install ${missing[*]}"
  if [[ $made ]]; then rm -f "$made"; trap - EXIT; fi
}

configure() {
  local host comm= i
  host=$(hostname -s)
  mkdir -p "$LAB_DIR"
  [[ -O $LAB_DIR && -z $(ls -A "$LAB_DIR") ]] || die "$LAB_DIR holds something else"
  touch "$MARK"
  mkdir "$RUN" "$LOG" "$LAB_DIR"/{bin,dev,spool,state}
  install -m 755 "$HERE/sacct" "$LAB_DIR/bin/sacct"
  (umask 077; head -c 1024 /dev/urandom >"$LAB_DIR/munge.key")

  # A daemon calls back to the source address of a connection, which for all of 127/8 is 127.0.0.1. So where only
  # loopback is listened on, all names must resolve to just that, or an srun inside a job hangs for ever.
  [[ $(getent ahostsv4 "$host" | awk '{print $1; exit}') != 127.0.0.1 ]] ||
    comm=CommunicationParameters=NoCtldInAddrAny,NoInAddrAny

  cat >"$SLURM_CONF" <<EOF
ClusterName=seer-scale-lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$SLURMCTLD_PORT
SlurmUser=root
SlurmdUser=root
$comm
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits; less than 5 is silently taken for 120
AuthInfo=socket=$SOCKET,cred_expire=5
StateSaveLocation=$LAB_DIR/state
SlurmdSpoolDir=$LAB_DIR/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$LAB_DIR/spool/%n/slurmd.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd-%n.log

# no cgroups, no binding, and this file is believed, not the hardware
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core

# fast clocks
KillWait=5
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=5
ReturnToService=2
# finished jobs stay to be asked for: there is no slurmdbd
MinJobAge=3600

# A job goes back to the queue when a node fails, when it asks for it (scontrol requeue) and when it is preempted, then
# after its own --signal and the GraceTime. RequeueExit is left out: few clusters have it.
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF

GresTypes=gpu
NodeName=DEFAULT CPUs=$CPUS CoresPerSocket=$CPUS RealMemory=1000000 Gres=gpu:$GPUS
EOF
  for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=n$i NodeAddr=127.0.0.1 Port=$((SLURMD_PORT + i))" >>"$SLURM_CONF"
    echo "127.0.0.1 n$i $HOSTS_MARK" >>/etc/hosts # rank 0's node is found by its name
  done

  # Nothing uses cgroups, but a plugin that is not named is looked for, in vain where none are mounted.
  echo CgroupPlugin=cgroup/v1 >"$LAB_DIR/cgroup.conf"

  # A GPU has to be a device, so these are copies of /dev/null.
  for ((i = 0; i < GPUS; i++)); do mknod -m 666 "$LAB_DIR/dev/gpu$i" c 1 3; done
  printf 'AutoDetect=off\nName=gpu File=%s\n' "$LAB_DIR/dev/gpu[0-$((GPUS - 1))]" >"$LAB_DIR/gres.conf"
}

start_daemons() {
  munged --force --key-file="$LAB_DIR/munge.key" --socket="$SOCKET" --pid-file="$RUN/munged.pid" \
    --seed-file="$RUN/munge.seed" --log-file="$LOG/munged.log" >>"$LOG/munged.out" 2>&1 ||
    die "munged: $(<"$LOG/munged.out")"
  wait_for 10 test -S "$SOCKET"
  slurmctld -f "$SLURM_CONF" >>"$LOG/slurmctld.out" 2>&1 || die "slurmctld: $(<"$LOG/slurmctld.out")"
}

# ---------------------------------------------------------------------------------------------- nodes

# A node has its own processes, host name and mounts. Its pid 1 is a shell, whose end the kernel lets all others share;
# before it mounts its own /proc it learns there what its pid is outside.
# shellcheck disable=SC2016
power_on() {
  rm -f "$RUN/$1.pid"
  mkdir -p "$LAB_DIR/spool/$1"
  cd /
  setsid unshare --fork --pid --uts --mount bash -c '
    set -e
    read -r pid _ </proc/self/stat
    echo "$pid" >"$2/$1.pid"
    mount -t proc proc /proc
    hostname "$1"
    slurmd -D -N "$1" &
    wait $!
  ' node "$1" "$RUN" </dev/null >>"$LOG/$1.out" 2>&1 &
  wait_for 10 test -s "$RUN/$1.pid"
}

powered() { [[ -s $RUN/$1.pid ]] && ours "$(<"$RUN/$1.pid")"; }

node_state() { scontrol -o show node "$1" | sed 's/.* State=\([^ ]*\).*/\1/'; }

down() { [[ $(node_state "$1") == DOWN* ]]; }

# usable nX: it has registered since its last start and takes jobs. (sinfo lags by seconds.)
usable() {
  [[ $(scontrol -o show node "$1") =~ SlurmdStartTime=([0-9T:-]+) ]] || return 1
  (($(date -d "${BASH_REMATCH[1]}" +%s) >= $(stat -c %Y "$RUN/$1.pid"))) || return 1
  case $(node_state "$1") in
    DOWN* | *DRAIN*) scontrol update "nodename=$1" state=resume || true; return 1 ;; # as `now` left it
    UNKNOWN* | *'*'* | *NOT_RESPONDING*) return 1 ;;
  esac
}

# ---------------------------------------------------------------------------------------------- commands

up() {
  local i
  install_packages
  clean
  configure
  start_daemons
  for ((i = 1; i <= NODES; i++)); do power_on "n$i"; done
  for ((i = 1; i <= NODES; i++)); do wait_for 60 usable "n$i"; done
}

kill_node() {
  end "$RUN/$1.pid" KILL 10 # a namespace's pid 1 is gone only after all others in it
  [[ ${2:-} != now ]] || scontrol update "nodename=$1" state=down reason="power cut"
}

# A machine takes longer to boot than SlurmdTimeout: one that was back sooner would leave slurmctld with jobs that it
# believes running there.
start_node() {
  if ! powered "$1"; then
    wait_for 60 down "$1"
    power_on "$1"
  fi
  wait_for 60 usable "$1"
}

stop() {
  local file
  for file in "$RUN"/n*.pid; do end "$file" KILL 10; done
  end "$RUN/slurmctld.pid" TERM 10
  end "$RUN/munged.pid" TERM 5
}

clean() {
  local hosts
  [[ -e $MARK ]] || return 0
  stop
  hosts=$(grep -vF -- "$HOSTS_MARK" /etc/hosts || true)
  printf '%s\n' "$hosts" >/etc/hosts # in a container it is a mount and cannot be replaced
  rm -rf "$LAB_DIR"
}

case ${1:-} in
  up | stop | clean) "$1" ;;
  install) install_packages ;;
  kill-node) kill_node "$2" "${3:-}" ;;
  start-node) start_node "$2" ;;
  env) echo "export SLURM_CONF='$SLURM_CONF' PATH='$LAB_DIR/bin':\"\$PATH\"" ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
