#!/usr/bin/env bash
# shellcheck disable=SC1090,SC1091,SC2016
# A real SLURM cluster on one Debian machine, without systemd or containers:
# munged, slurmctld and N slurmd daemons, each slurmd on a "node" of its own
# (network + hostname + mount + process namespaces).
#
#   slurm_cluster.sh start DIR [options]     bring it up and wait until every node is idle (again = no-op)
#   slurm_cluster.sh stop DIR                cancel all jobs and end every process it started
#   slurm_cluster.sh status DIR              exit 0 if the controller and all nodes are up
#   slurm_cluster.sh exec DIR NODE CMD...    run CMD inside a node
#   slurm_cluster.sh kill-node DIR NODE      power loss: SIGKILL everything on that node
#   slurm_cluster.sh kill-slurmd DIR NODE    only the daemon dies, the processes of jobs go on
#   slurm_cluster.sh start-node DIR NODE     bring a killed node (or only its slurmd) back
#
# Config, key, state, logs and pids are all under DIR. Source DIR/env.sh for the
# client commands (it puts DIR/bin first in PATH and sets SLURM_CONF).
# Needs root and: apt-get install -y --no-install-recommends \
#   slurmctld slurmd slurm-client munge iproute2 util-linux
set -euo pipefail

NODES=2 GPUS=2 CPUS=64 MEM_MB=512000 PREFIX=n MODE=ns PORT=26800 PROCTRACK=auto GRACE_TIME=0 EXTRA=
REQUEUE_DELAY=5 KILL_WAIT=5 SLURMD_TIMEOUT=10 WAIT=30
PARAMS='NODES GPUS CPUS MEM_MB PREFIX MODE PORT PROCTRACK REQUEUE_DELAY KILL_WAIT SLURMD_TIMEOUT GRACE_TIME EXTRA'

die() { echo "slurm_cluster: $*" >&2; exit 1; }
usage() {
  sed -n '2,18s/^# \{0,1\}//p' "$0"
  cat <<U
options of start (default):
  --nodes N ($NODES)    --gpus PER_NODE ($GPUS; 0 = none)    --cpus PER_NODE ($CPUS)    --mem-mb PER_NODE ($MEM_MB)
  --prefix NAME ($PREFIX; nodes are ${PREFIX}1, ${PREFIX}2, ...)    --wait SECONDS ($WAIT)
  --mode ns|plain ($MODE; plain: no namespaces, all daemons on 127.0.0.1, names appended to /etc/hosts)
  --port BASE ($PORT; only plain mode has to care)
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
# do not inherit a surrounding job
for v in ${!SLURM_@} ${!SBATCH_@} ${!SRUN_@}; do [ "$v" = SLURM_CONF ] || unset "$v"; done

# --- processes: remembered as "PID STARTTIME", so a recycled pid is never signalled
pstat() { # PID -> STATE STARTTIME
  local s f; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -ra f <<<"${s##*) }"; echo "${f[0]} ${f[19]}"
}
save_pid() { local st; st=$(pstat "$2") || die "$1 did not start, see $DIR/log"; echo "$2 ${st#* }" >"$DIR/pids/$1"; }
live_pid() { # NAME -> pid, if that process still runs
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
first_child() { # PID -> its first child, once there
  local i c
  for ((i = 0; i < 200; i++)); do
    c=$(cat "/proc/$1/task/$1/children" 2>/dev/null || true)
    [ -n "$c" ] && { echo "${c%% *}"; return; }
    sleep 0.02
  done
  die "nothing started under process $1, see $DIR/log"
}

# --- addresses: 127.1.0.x on veth pairs inside own network namespaces. They are
# in the loopback range on purpose: a stray connection from outside ends at this
# machine's own lo and can never leave it.
LOGIN_ADDR=127.1.0.1
node_addr() { if [ "$MODE" = ns ]; then echo "127.1.0.$((10 + $1))"; else echo 127.0.0.1; fi; }
node_index() { local k=${1#"$PREFIX"}; [[ $k =~ ^[1-9][0-9]*$ && $k -le $NODES ]] || die "no node '$1'"; echo "$k"; }
# run inside the namespace: DEVICE ADDRESS
net_setup='for i in all default "$1"; do echo 1 >/proc/sys/net/ipv4/conf/$i/route_localnet; done
  ip link set lo up; ip addr flush dev lo; ip addr add 127.0.0.1/32 dev lo
  ip addr add "$2/24" dev "$1"; ip link set "$1" up'
# pid 1 of a node: names it, waits for its eth0, runs slurmd, reaps orphans, stays if slurmd dies
node_init='hostname "$3"; mount --bind "$4/hosts" /etc/hosts
  if [ -n "$5" ]; then mkdir -p "$5" && mount --bind "$5" /sys/fs/cgroup/freezer; fi
  until grep -q eth0: /proc/net/dev; do sleep 0.01; done
  '$net_setup'
  slurmd -D -N "$3" & while :; do sleep 3600 & wait $!; done'

cgroup_of() { # NODE -> its own part of the freezer hierarchy, mounted over the whole one inside the node
  [ "$PROCTRACK" != cgroup ] || [ "$MODE" != ns ] || echo "/sys/fs/cgroup/freezer/slurm_cluster.$(cksum <<<"$DIR" | cut -d' ' -f1)/$1"
}
clear_cgroup() { # NODE: after its processes are gone
  local c; c=$(cgroup_of "$1"); [ -d "${c:-/nonexistent}" ] || return 0
  find "$c" -depth -type d -exec rmdir {} + 2>/dev/null || true; rmdir "${c%/*}" 2>/dev/null || true
}
write_config() {
  local k c ctl=$LOGIN_ADDR
  if [ -f "$DIR/params" ]; then rm -rf "$DIR"/state "$DIR"/spool.* "$DIR"/pids; fi # each start is a new, empty cluster; logs are kept
  mkdir -p "$DIR"/{munge,state,log,pids,dev}; chmod 711 "$DIR/munge"
  [ -s "$DIR/munge/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$DIR/munge/munge.key")
  for k in $PARAMS; do printf '%s=%q\n' "$k" "${!k}"; done >"$DIR/params"
  { cat /etc/hosts; for ((k = 1; k <= NODES; k++)); do echo "$(node_addr "$k") $PREFIX$k"; done; } >"$DIR/hosts"
  : >"$DIR/gres.conf"; : >"$DIR/plugstack.conf"
  [ "$PROCTRACK" != cgroup ] || printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n' >"$DIR/cgroup.conf"
  if [ "$GPUS" -gt 0 ]; then
    # each GPU needs a device file of its own: nodes with the numbers of /dev/null do
    for ((k = 0; k < GPUS; k++)); do [ -e "$DIR/dev/nvidia$k" ] || mknod -m 666 "$DIR/dev/nvidia$k" c 1 3; done
    echo "Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >"$DIR/gres.conf"
  fi
  [ "$MODE" = ns ] || ctl=127.0.0.1
  {
    cat <<C
ClusterName=local
SlurmctldHost=localhost($ctl)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120)
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
# the sizes claimed below need not exist
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
    [ "$MODE" = ns ] || echo CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
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
  [ "$MODE" = ns ] || return 0
  mkdir "$DIR/bin"
  echo 'export PATH='"$(printf %q "$DIR/bin")"':"$PATH"' >>"$DIR/env.sh"
  for c in sbatch srun salloc squeue scontrol scancel sinfo sattach sbcast sdiag sprio strigger; do
    # enters the controller's network, unless called on a node (from a job) or while the cluster is down
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
start_login() { # the network namespace of the controller and of the client commands, with the bridge
  [ "$MODE" = ns ] || return 0
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
  local net=(); [ "$MODE" != ns ] || net=(nsenter -t "$(live_pid login)" -n)
  setsid "${net[@]}" slurmctld -D </dev/null >>"$DIR/log/slurmctld.out" 2>&1 9>&- &
  save_pid slurmctld $!
}
start_node() { # INDEX
  local k=$1 n=$PREFIX$1 p addr cg out="$DIR/log/slurmd.$PREFIX$1.out"
  addr=$(node_addr "$k") cg=$(cgroup_of "$n") # not inside the command below: its first child must be the node's pid 1
  mkdir -p "$DIR/spool.$n"
  node_slurmd "$n" >/dev/null && return
  if [ "$MODE" != ns ]; then
    setsid slurmd -D -N "$n" </dev/null >>"$out" 2>&1 9>&- &
    save_pid "slurmd.$n" $!
  elif p=$(live_pid "node.$n"); then # the node is up, its slurmd is not
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
node_slurmd() { # NODE -> pid (as seen here) of its slurmd
  [ "$MODE" = ns ] || { live_pid "slurmd.$1"; return; }
  local p ns c; p=$(live_pid "node.$1") || return 1
  ns=$(readlink "/proc/$p/ns/pid")
  for c in /proc/[0-9]*; do
    if [ "$(cat "$c/comm" 2>/dev/null)" = slurmd ] && [ "$(readlink "$c/ns/pid" 2>/dev/null)" = "$ns" ]; then echo "${c#/proc/}"; return; fi
  done
  return 1
}
stray_pids() { # plain mode: what is left of jobs, known by their SLURM_CONF and not by that alone (a user's shell has it too)
  local c e
  for c in /proc/[0-9]*; do
    e=$(tr '\0' '\n' 2>/dev/null <"$c/environ") || continue
    grep -qxF "SLURM_CONF=$SLURM_CONF" <<<"$e" || continue
    if grep -q ^SLURMD_NODENAME= <<<"$e" || [ "$(cat "$c/comm" 2>/dev/null)" = slurmstepd ]; then echo "${c#/proc/}"; fi
  done
  return 0
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
  case $MODE in ns|plain) ;; *) die "--mode is ns or plain";; esac
  [ "$MODE" = plain ] || unshare --net --mount --uts --pid --fork --mount-proc true || die "no namespaces here: use --mode plain"
  [ ! -d "$DIR" ] || [ -f "$DIR/.slurm_cluster" ] || [ -z "$(ls -A "$DIR")" ] || die "not empty and not a cluster's: $DIR"
  # what is left of a cluster whose controller died
  if [ -d "$DIR/pids" ] && ! live_pid slurmctld >/dev/null; then bash "$0" stop "$DIR" >/dev/null; fi
  mkdir -p "$DIR"; exec 9>"$DIR/.slurm_cluster"; flock 9
  if [ "$PROCTRACK" = auto ]; then
    PROCTRACK=linuxproc
    if [ "$MODE" = ns ] && [ -w /sys/fs/cgroup/freezer/cgroup.procs ]; then PROCTRACK=cgroup; fi
  fi
  if live_pid slurmctld >/dev/null; then . "$DIR/params"; else write_config; fi
  if [ "$MODE" = plain ]; then
    for ((k = 1; k <= NODES; k++)); do getent hosts "$PREFIX$k" >/dev/null || echo "127.0.0.1 $PREFIX$k # $DIR" >>/etc/hosts; done
  fi
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
    if [ "$MODE" = ns ]; then end_pid "node.$n" KILL 5; clear_cgroup "$n"; continue; fi
    end_pid "slurmd.$n" TERM 5
  done
  if [ "$MODE" = plain ]; then for p in $(stray_pids); do kill -KILL "$p" 2>/dev/null || true; done; fi
  end_pid slurmctld TERM 10
  end_pid login TERM 2
  end_pid munged TERM 5
  if [ "$MODE" = plain ]; then grep -v " # $DIR\$" /etc/hosts >"$DIR/hosts.orig" || true; cat "$DIR/hosts.orig" >/etc/hosts; fi
  echo stopped;;
status)
  live_pid slurmctld >/dev/null || { echo "not running"; exit 3; }
  client sinfo -N -p debug -o '%N %T %G %E'; client squeue; all_up;;
kill-node)
  node_index "${1:?NODE}" >/dev/null; [ "$MODE" = ns ] || die "only in ns mode"
  end_pid "node.$1" KILL 5; clear_cgroup "$1";;
kill-slurmd)
  node_index "${1:?NODE}" >/dev/null; p=$(node_slurmd "$1") || die "no slurmd on $1"; kill -KILL "$p";;
start-node)
  k=$(node_index "${1:?NODE}"); live_pid slurmctld >/dev/null || die "not running"; start_node "$k";;
exec)
  n=${1:?NODE}; shift; node_index "$n" >/dev/null
  [ "$MODE" = ns ] || exec "$@"
  p=$(live_pid "node.$n") || die "$n is down"; exec nsenter -t "$p" -m -u -n -p --wd="$PWD" "$@";;
*) usage >&2; exit 2;;
esac
