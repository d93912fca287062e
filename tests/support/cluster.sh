#!/usr/bin/env bash
# shellcheck disable=SC1090,SC1091,SC2016
# A real SLURM cluster on one Debian machine, without systemd or containers:
# munged, slurmctld and N slurmd daemons, each slurmd on a "node" of its own
# (network, hostname, mount and process namespaces).
#
#   cluster.sh start DIR [options]     start it and wait until every node is idle; does nothing if it is running
#   cluster.sh stop DIR                cancel all jobs and end every process that `start` started
#   cluster.sh status DIR              exit 0 if the controller and all nodes are up
#   cluster.sh exec DIR NODE CMD...    run CMD on a node
#   cluster.sh kill-node DIR NODE      simulate a power loss: SIGKILL for every process of the node
#   cluster.sh start-node DIR NODE     start a killed node again
#
# DIR holds the configuration, key, state, logs and process ids. Source DIR/env.sh to use the
# client commands: it puts DIR/bin first in PATH and sets SLURM_CONF.
# Needs root and: apt-get install -y --no-install-recommends \
#   slurmctld slurmd slurm-client munge iproute2 util-linux
set -euo pipefail

NODES=2 GPUS=2 CPUS=64 MEM_MB=512000 PREFIX=n PORT=26800 PROCTRACK=auto GRACE_TIME=0 EXTRA=
REQUEUE_DELAY=5 KILL_WAIT=5 SLURMD_TIMEOUT=10 WAIT=30
PARAMS='NODES GPUS CPUS MEM_MB PREFIX PORT PROCTRACK REQUEUE_DELAY KILL_WAIT SLURMD_TIMEOUT GRACE_TIME EXTRA'

die() { echo "cluster: $*" >&2; exit 1; }
usage() {
  sed -n '3,17s/^# \{0,1\}//p' "$0"
  cat <<U
options of start (default):
  --nodes N ($NODES)    --gpus PER_NODE ($GPUS; 0 = none)    --cpus PER_NODE ($CPUS)    --mem-mb PER_NODE ($MEM_MB)
  --prefix NAME ($PREFIX; nodes are ${PREFIX}1, ${PREFIX}2, ...)    --wait SECONDS ($WAIT)
  --port BASE ($PORT)
  --requeue-delay S ($REQUEUE_DELAY; SLURM's default 120, least 5)    --kill-wait S ($KILL_WAIT; SLURM's default 30)
  --slurmd-timeout S ($SLURMD_TIMEOUT; SLURM's default 300)    --grace-time S of preempted jobs ($GRACE_TIME)
  --proctrack cgroup|linuxproc|auto ($PROCTRACK: cgroup, as on real clusters, where a cgroup v1 freezer is mounted)
  --extra LINES of slurm.conf, appended (none)
U
}

case ${1:-help} in -h|--help|help) usage; exit 0;; esac
[ $# -ge 2 ] || { usage >&2; exit 2; }
CMD=$1; DIR=$(realpath -m "$2"); shift 2
if [ "$CMD" = start ]; then
  while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || die "no value for $1"
    v=${1#--}; v=${v//-/_}; v=${v^^}
    case " $PARAMS WAIT " in *" $v "*) printf -v "$v" %s "$2";; *) die "unknown option $1";; esac
    shift 2
  done
elif [ -f "$DIR/params" ]; then
  . "$DIR/params"
fi
export PATH=/usr/sbin:/usr/bin:/sbin:/bin SLURM_CONF=$DIR/slurm.conf
# A surrounding job must not affect the cluster.
for v in ${!SLURM_@} ${!SBATCH_@} ${!SRUN_@}; do [ "$v" = SLURM_CONF ] || unset "$v"; done

# --- processes: stored as "PID STARTTIME", so that a reused pid never gets a signal
pstat() { # PID -> STATE STARTTIME
  local s f; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -ra f <<<"${s##*) }"; echo "${f[0]} ${f[19]}"
}
save_pid() { local st; st=$(pstat "$2") || die "$1 did not start, see $DIR/log"; echo "$2 ${st#* }" >"$DIR/pids/$1"; }
live_pid() { # NAME -> pid, if the process still runs
  local p t st; { read -r p t <"$DIR/pids/$1"; } 2>/dev/null || return 1
  st=$(pstat "$p") || return 1
  [ "${st#* }" = "$t" ] && [ "${st% *}" != Z ] && echo "$p"
}
end_pid() { # NAME SIGNAL SECONDS
  local p i
  if p=$(live_pid "$1"); then
    kill -"$2" "$p" 2>/dev/null || true
    for ((i = 0; i < $3 * 20; i++)); do live_pid "$1" >/dev/null || break; sleep 0.05; done
    if p=$(live_pid "$1"); then kill -KILL "$p" 2>/dev/null || true; fi
  fi
  rm -f "$DIR/pids/$1"
}
first_child() { # PID -> its first child, after waiting for it
  local i c
  for ((i = 0; i < 200; i++)); do
    c=$(cat "/proc/$1/task/$1/children" 2>/dev/null || true)
    [ -n "$c" ] && { echo "${c%% *}"; return; }
    sleep 0.02
  done
  die "nothing started under process $1, see $DIR/log"
}

# --- addresses: 127.1.0.x on veth pairs in network namespaces. They are in the
# loopback range on purpose: a connection from outside the namespaces reaches this
# machine's lo and never leaves it.
LOGIN_ADDR=127.1.0.1
node_addr() { echo "127.1.0.$((10 + $1))"; }
node_index() { local k=${1#"$PREFIX"}; [[ $k =~ ^[1-9][0-9]*$ && $k -le $NODES ]] || die "no node '$1'"; echo "$k"; }
# runs inside the namespace; arguments: DEVICE ADDRESS
net_setup='for i in all default "$1"; do echo 1 >/proc/sys/net/ipv4/conf/$i/route_localnet; done
  ip link set lo up; ip addr flush dev lo; ip addr add 127.0.0.1/32 dev lo
  ip addr add "$2/24" dev "$1"; ip link set "$1" up'
# pid 1 of a node: sets its name, waits for eth0, runs slurmd, reaps orphans, and survives slurmd
node_init='hostname "$3"; mount --bind "$4/hosts" /etc/hosts
  if [ -n "$5" ]; then mkdir -p "$5" && mount --bind "$5" /sys/fs/cgroup/freezer; fi
  until grep -q eth0: /proc/net/dev; do sleep 0.01; done
  '$net_setup'
  slurmd -D -N "$3" & while :; do sleep 3600 & wait $!; done'

cgroup_of() { # NODE -> its part of the freezer hierarchy, which replaces the whole one inside the node
  [ "$PROCTRACK" != cgroup ] || echo "/sys/fs/cgroup/freezer/slurm_cluster.$(cksum <<<"$DIR" | cut -d' ' -f1)/$1"
}
clear_cgroup() { # NODE; call it after its processes have ended
  local c; c=$(cgroup_of "$1"); [ -d "${c:-/nonexistent}" ] || return 0
  find "$c" -depth -type d -exec rmdir {} + 2>/dev/null || true; rmdir "${c%/*}" 2>/dev/null || true
}
write_config() {
  local k c
  if [ -f "$DIR/params" ]; then rm -rf "$DIR"/state "$DIR"/spool.* "$DIR"/pids; fi # each start makes a new, empty cluster but keeps logs
  mkdir -p "$DIR"/{munge,state,log,pids,dev}; chmod 711 "$DIR/munge"
  [ -s "$DIR/munge/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$DIR/munge/munge.key")
  for k in $PARAMS; do printf '%s=%q\n' "$k" "${!k}"; done >"$DIR/params"
  { cat /etc/hosts; for ((k = 1; k <= NODES; k++)); do echo "$(node_addr "$k") $PREFIX$k"; done; } >"$DIR/hosts"
  : >"$DIR/gres.conf"; : >"$DIR/plugstack.conf"
  [ "$PROCTRACK" != cgroup ] || printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n' >"$DIR/cgroup.conf"
  if [ "$GPUS" -gt 0 ]; then
    # each GPU needs its own device file; one with the numbers of /dev/null is enough
    for ((k = 0; k < GPUS; k++)); do [ -e "$DIR/dev/nvidia$k" ] || mknod -m 666 "$DIR/dev/nvidia$k" c 1 3; done
    echo "Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >"$DIR/gres.conf"
  fi
  {
    cat <<C
ClusterName=local
SlurmctldHost=localhost($LOGIN_ADDR)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before its next start (default 120)
AuthInfo=socket=$DIR/munge/munge.sock,cred_expire=$REQUEUE_DELAY
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/$PROCTRACK
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((MEM_MB / CPUS))
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=$KILL_WAIT
SlurmdTimeout=$SLURMD_TIMEOUT
MinJobAge=3600
# slurmd does not check the sizes below against the machine
SlurmdParameters=config_overrides
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
PlugStackConfig=$DIR/plugstack.conf
C
    if [ "$GPUS" -gt 0 ]; then echo GresTypes=gpu; fi
    for ((k = 1; k <= NODES; k++)); do
      echo "NodeName=$PREFIX$k NodeAddr=$(node_addr "$k") Port=$((PORT + k)) CPUs=$CPUS RealMemory=$MEM_MB" \
        "$([ "$GPUS" -eq 0 ] || echo "Gres=gpu:$GPUS")"
    done
    echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=$GRACE_TIME"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10"
    [ -z "$EXTRA" ] || printf '%b\n' "$EXTRA"
  } >"$DIR/slurm.conf"
  rm -rf "${DIR:?}/bin"
  printf 'export SLURM_CONF=%q\n' "$DIR/slurm.conf" >"$DIR/env.sh"
  mkdir "$DIR/bin"
  echo 'export PATH='"$(printf %q "$DIR/bin")"':"$PATH"' >>"$DIR/env.sh"
  for c in sbatch srun salloc squeue scontrol scancel sinfo sattach sbcast sdiag sprio strigger; do
    # enters the controller's network, unless it runs on a node (in a job) or the cluster is down
    cat >"$DIR/bin/$c" <<W
#!/bin/sh
if [ -z "\$SLURMD_NODENAME" ] && read -r p _ 2>/dev/null <"$DIR/pids/login"; then exec nsenter -t "\$p" -n /usr/bin/$c "\$@"; fi
exec /usr/bin/$c "\$@"
W
    chmod +x "$DIR/bin/$c"
  done
}

start_munge() {
  live_pid munged >/dev/null && return
  munged --force --key-file="$DIR/munge/munge.key" --socket="$DIR/munge/munge.sock" --pid-file="$DIR/munge/munged.pid" \
    --seed-file="$DIR/munge/seed" --log-file="$DIR/log/munged.log" 9>&- || die "munged failed, see $DIR/log/munged.log"
  save_pid munged "$(cat "$DIR/munge/munged.pid")"
}
start_login() { # starts the network namespace of the controller and the client commands, with the bridge
  live_pid login >/dev/null && return
  setsid unshare --net bash -ec "ip link add br0 type bridge; $net_setup"'; exec sleep infinity' login br0 "$LOGIN_ADDR" \
    </dev/null >>"$DIR/log/login.out" 2>&1 9>&- &
  save_pid login $!
  local i
  for ((i = 0; i < 100; i++)); do [ "$(cat "/proc/$!/comm" 2>/dev/null)" = sleep ] && return; sleep 0.02; done
  die "no bridge, see $DIR/log/login.out"
}
start_ctld() {
  live_pid slurmctld >/dev/null && return
  setsid nsenter -t "$(live_pid login)" -n slurmctld -D </dev/null >>"$DIR/log/slurmctld.out" 2>&1 9>&- &
  save_pid slurmctld $!
}
start_node() { # INDEX
  local k=$1 n=$PREFIX$1 p addr cg out="$DIR/log/slurmd.$PREFIX$1.out"
  addr=$(node_addr "$k") cg=$(cgroup_of "$n") # computed here, as the first child of the command below must be the node's pid 1
  mkdir -p "$DIR/spool.$n"
  node_slurmd "$n" >/dev/null && return
  if p=$(live_pid "node.$n"); then # the node runs without its slurmd
    setsid nsenter -t "$p" -m -u -n -p slurmd -D -N "$n" </dev/null >>"$out" 2>&1 9>&- &
  else
    setsid unshare --net --mount --uts --pid --fork --mount-proc --kill-child \
      bash -c "$node_init" init eth0 "$addr" "$n" "$DIR" "$cg" </dev/null >>"$out" 2>&1 9>&- &
    p=$(first_child $!); save_pid "node.$n" "$p"
    nsenter -t "$(live_pid login)" -n sh -ec 'ip link del "v$1" 2>/dev/null || :
      ip link add "v$1" type veth peer name eth0 address "02:00:00:00:00:$3" netns "$2"; ip link set "v$1" master br0 up' \
      veth "$k" "$p" "$(printf %02x "$k")" \
      || die "no veth for $n"
  fi
}
node_slurmd() { # NODE -> pid of its slurmd, outside the node's namespace
  local p ns c; p=$(live_pid "node.$1") || return 1
  ns=$(readlink "/proc/$p/ns/pid")
  for c in /proc/[0-9]*; do
    if [ "$(cat "$c/comm" 2>/dev/null)" = slurmd ] && [ "$(readlink "$c/ns/pid" 2>/dev/null)" = "$ns" ]; then echo "${c#/proc/}"; return; fi
  done
  return 1
}
client() { local b=$DIR/bin/$1; [ -x "$b" ] || b=/usr/bin/$1; timeout 10 "$b" "${@:2}"; }
all_up() { [ "$(client sinfo -h -N -p debug -o %T 2>/dev/null | grep -cE '^(idle|mixed|allocated|completing)$')" = "$NODES" ]; }

case $CMD in
start)
  [ "$(id -u)" = 0 ] || die "needs root"
  for c in munged slurmctld slurmd sbatch ip nsenter; do
    command -v $c >/dev/null || die "no $c here: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2 util-linux"
  done
  [ ${#DIR} -le 64 ] || die "DIR is too long for the Unix sockets under it: $DIR"
  [ "$NODES" -ge 1 ] && [ "$NODES" -le 200 ] || die "1 to 200 nodes"
  unshare --net --mount --uts --pid --fork --mount-proc true || die "this machine does not allow namespaces"
  [ ! -d "$DIR" ] || [ -f "$DIR/.slurm_cluster" ] || [ -z "$(ls -A "$DIR")" ] || die "$DIR is neither empty nor the folder of a cluster"
  # end the remains of a cluster whose controller died
  if [ -d "$DIR/pids" ] && ! live_pid slurmctld >/dev/null; then bash "$0" stop "$DIR" >/dev/null; fi
  mkdir -p "$DIR"; exec 9>"$DIR/.slurm_cluster"; flock 9
  if [ "$PROCTRACK" = auto ]; then
    PROCTRACK=linuxproc
    if [ -w /sys/fs/cgroup/freezer/cgroup.procs ]; then PROCTRACK=cgroup; fi
  fi
  if live_pid slurmctld >/dev/null; then . "$DIR/params"; else write_config; fi
  start_munge; start_login; start_ctld
  for ((k = 1; k <= NODES; k++)); do start_node "$k"; done
  for ((i = 0; i < WAIT * 10; i++)); do
    live_pid slurmctld >/dev/null || { tail -n 5 "$DIR/log/slurmctld.log" >&2; die "slurmctld ended"; }
    all_up && { client sinfo; echo "source $DIR/env.sh"; exit 0; }
    sleep 0.1
  done
  client sinfo -N -l >&2 || true; tail -n 20 "$DIR"/log/* >&2; die "nodes not up after $WAIT s";;
stop)
  [ -d "$DIR/pids" ] || { echo "never started"; exit 0; }
  exec 9>"$DIR/.slurm_cluster"; flock 9
  if live_pid slurmctld >/dev/null; then
    client scancel -Q --state=PENDING,RUNNING,SUSPENDED --user="$(id -un)" 2>/dev/null || true
    for ((i = 0; i < 30; i++)); do [ -n "$(client squeue -h 2>/dev/null)" ] || break; sleep 0.1; done
  fi
  for ((k = 1; k <= NODES; k++)); do
    n=$PREFIX$k
    end_pid "node.$n" KILL 5
    clear_cgroup "$n"
  done
  end_pid slurmctld TERM 10
  end_pid login TERM 2
  end_pid munged TERM 5
  echo stopped;;
status)
  live_pid slurmctld >/dev/null || { echo "not running"; exit 3; }
  client sinfo -N -p debug -o '%N %T %G %E'; client squeue; all_up;;
kill-node)
  node_index "${1:?NODE}" >/dev/null
  end_pid "node.$1" KILL 5; clear_cgroup "$1";;
start-node)
  k=$(node_index "${1:?NODE}"); live_pid slurmctld >/dev/null || die "not running"; start_node "$k";;
exec)
  n=${1:?NODE}; shift; node_index "$n" >/dev/null
  p=$(live_pid "node.$n") || die "$n is down"; exec nsenter -t "$p" -m -u -n -p --wd="$PWD" "$@";;
*) usage >&2; exit 2;;
esac
