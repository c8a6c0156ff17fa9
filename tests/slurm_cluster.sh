#!/usr/bin/env bash
# A real, throw-away SLURM cluster on one Linux host (loopback only, no systemd,
# no cgroups, root or not) for tests and CI.
#
#   slurm_cluster.sh up   [DIR]   start (no-op when already up); prints the env
#   slurm_cluster.sh down [DIR]   cancel all jobs, stop every daemon it started
#   slurm_cluster.sh env  [DIR]   print the `export` lines:  eval "$(... env DIR)"
#   slurm_cluster.sh status [DIR] what runs
#   slurm_cluster.sh node-kill NAME [DIR]    kill -9 that slurmd and its job steps
#   slurm_cluster.sh node-start NAME [DIR]   start it again
#   slurm_cluster.sh missing      print the Debian packages that `up` lacks, one a line
#
# DIR: default, a new `mktemp -d` for `up`, $SLURM_TEST_CLUSTER otherwise. Keep it short
# (unix socket paths): at most 60 characters. It must be readable by whoever submits jobs.
# Environment of `up`: STC_NODES=2 STC_CPUS=4 STC_MEM=4000 (MB per node) STC_GPUS=1 (per node)
#   STC_GPU_TYPE=h100 STC_GPU_FILE= (a pattern such as /dev/nvidia[0-1] for real ones;
#   default, links to /dev/null) STC_ACCOUNTING=0 (1: mariadb + slurmdbd, so that sacct works)
#   STC_SLURMD_TIMEOUT=10 STC_KILL_WAIT=2 STC_EXTRA= (lines added to slurm.conf)
#   STC_HIDE_FROM= (n2:/some/path: that node sees an empty directory there; root only)
#   STC_OWNER= (a process id: once it is gone, take the cluster down and remove DIR)
#   STC_WAIT=30 (seconds to wait for the nodes)
set -u -o pipefail

PROG=${0##*/}
die() { echo "$PROG: error: $*" >&2; exit 1; }
say() { echo "$PROG: $*" >&2; }
PATH=$PATH:/usr/sbin:/sbin            # daemons live there; a plain user's PATH lacks it

missing() {  # missing 0|1: the commands that are not here (1: with accounting), each with its package
  local c
  for c in munged:munge slurmctld:slurmctld slurmd:slurmd sinfo:slurm-client python3:python3 \
    hostname:hostname setsid:util-linux unshare:util-linux; do
    command -v "${c%:*}" >/dev/null 2>&1 || echo "$c"
  done
  [ "$1" = 1 ] || return 0
  for c in slurmdbd:slurmdbd mariadbd:mariadb-server mariadb-install-db:mariadb-server; do
    command -v "${c%:*}" >/dev/null 2>&1 || echo "$c"
  done
}
packages() { sed 's/.*://' | sort -u; }  # of the lines of `missing`

free_ports() {  # free_ports N: N free TCP ports on 127.0.0.1
  python3 - "$1" <<'PY'
import socket, sys
socks = []
for _ in range(int(sys.argv[1])):
    s = socket.socket(); s.bind(("127.0.0.1", 0)); socks.append(s)
print(*[s.getsockname()[1] for s in socks])
PY
}

# A process is ours when its environment has our marker.
ours() { [ -r "/proc/$1/environ" ] && tr '\0' '\n' <"/proc/$1/environ" 2>/dev/null | grep -qxF "STC_DIR=$D"; }
alive() { # alive PIDFILE -> pid
  local p; p=$(cat "$1" 2>/dev/null) || return 1
  [ -n "$p" ] && [ -d "/proc/$p" ] && ours "$p" && echo "$p"
}
stop_pids() {  # stop_pids SECONDS PIDFILE...: TERM to all, wait, KILL those left
  local t=$1 f p i pids=() left; shift
  for f in "$@"; do p=$(alive "$f") && pids+=("$p"); done
  if [ ${#pids[@]} -gt 0 ]; then
    kill -TERM "${pids[@]}" 2>/dev/null
    for ((i = 0; i < t * 20; i++)); do
      left=(); for p in "${pids[@]}"; do [ -d "/proc/$p" ] && left+=("$p"); done
      [ ${#left[@]} -eq 0 ] && break
      sleep 0.05
    done
    [ ${#left[@]} -gt 0 ] && { kill -KILL "${left[@]}" 2>/dev/null; sleep 0.1; }
  fi
  rm -f "$@"
}
wait_for() { # wait_for SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  while [ $SECONDS -lt $end ]; do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
  return 1
}
fail_up() { say "error: $1"; for f in "$D"/log/*.log; do [ -s "$f" ] && { echo "--- $f" >&2; tail -n 8 "$f" >&2; }; done; cmd_down >/dev/null 2>&1; exit 1; }

set_dir() {
  D=${1:-${SLURM_TEST_CLUSTER:-}}
  [ -n "$D" ] || die "no directory given and SLURM_TEST_CLUSTER is not set"
  [ -d "$D" ] || die "no such directory: $D"
  D=$(cd "$D" && pwd -P)
  export STC_DIR=$D SLURM_CONF=$D/etc/slurm.conf
}

start_node() {
  local n=$1 hide
  mkdir -p "$D/spool/$n"
  hide=$(cat "$D/run/hide-$n" 2>/dev/null)
  if [ -n "$hide" ]; then
    # a mount namespace of its own: only this slurmd and its jobs see the empty directory
    STC_NODE=$n unshare -m sh -c 'mount -t tmpfs -o size=1m tmpfs "$1" && exec slurmd -N "$2" -f "$3"' \
      sh "$hide" "$n" "$SLURM_CONF"
  else
    STC_NODE=$n slurmd -N "$n" -f "$SLURM_CONF"
  fi
}

write_config() {
  local me host srun_bin nodes=() ports i n gres=
  [ "$GPUS" = 0 ] || gres=" Gres=gpu:$GPU_TYPE:$GPUS"
  me=$(id -un) || die "uid $(id -u) has no user name (SLURM and munge need a passwd entry)"
  host=$(hostname -s)
  srun_bin=$(PATH=${PATH//$D\/bin:/} command -v srun)
  read -r -a ports <<<"$(free_ports $((N_NODES + 3)))"
  [ "${#ports[@]}" -eq $((N_NODES + 3)) ] || die "no free ports"
  local p_ctld=${ports[0]} p_dbd=${ports[1]} p_sql=${ports[2]}
  # slurm.conf ---------------------------------------------------------------
  {
    cat <<CONF
ClusterName=stc
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$p_ctld
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$D/munge/munge.sock
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=${STC_SLURMD_TIMEOUT:-10}
KillWait=${STC_KILL_WAIT:-2}
InactiveLimit=0
MinJobAge=3600
CompleteWait=0
JobRequeue=0
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
CONF
    if [ "$ACCT" = 1 ]; then
      cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$p_dbd
AccountingStoragePass=$D/munge/munge.sock
AccountingStorageTRES=gres/gpu
CONF
    else
      echo "AccountingStorageType=accounting_storage/none"
    fi
    for ((i = 1; i <= N_NODES; i++)); do
      echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$((i + 2))]} CPUs=$CPUS RealMemory=$MEM$gres State=UNKNOWN"
      nodes+=("n$i")
    done
    echo "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=100 State=UP"
    [ -n "${STC_EXTRA:-}" ] && printf '%s\n' "$STC_EXTRA"
  } >"$D/etc/slurm.conf"
  printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$srun_bin" >"$D/bin/srun"
  chmod 755 "$D/bin/srun"
  # gres.conf ----------------------------------------------------------------
  {
    echo "AutoDetect=off"
    [ "$GPUS" = 0 ] || for n in "${nodes[@]}"; do
      if [ -n "${STC_GPU_FILE:-}" ]; then
        echo "NodeName=$n Name=gpu Type=$GPU_TYPE File=$STC_GPU_FILE"
      else
        # gres/gpu without File= counts as 0, and CUDA_VISIBLE_DEVICES stays empty unless the file
        # is a character or block device: a link to /dev/null, named with the GPU's number, will do
        for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$D/dev/nvidia$i"; done
        echo "NodeName=$n Name=gpu Type=$GPU_TYPE File=$D/dev/nvidia$([ "$GPUS" -gt 1 ] && echo "[0-$((GPUS - 1))]" || echo 0)"
      fi
    done
  } >"$D/etc/gres.conf"
  printf '%s\n' "${nodes[@]}" >"$D/run/nodes"
  [ -z "${STC_HIDE_FROM:-}" ] || printf '%s' "${STC_HIDE_FROM#*:}" >"$D/run/hide-${STC_HIDE_FROM%%:*}"
  # slurmdbd.conf ------------------------------------------------------------
  if [ "$ACCT" = 1 ]; then
    cat >"$D/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$D/munge/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$p_dbd
SlurmUser=$me
LogFile=$D/log/slurmdbd.log
PidFile=$D/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$p_sql
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
    chmod 600 "$D/etc/slurmdbd.conf"
    echo "$p_sql" >"$D/run/sql_port"
  fi
}

start_accounting() {
  local me p; me=$(id -un); p=$(cat "$D/run/sql_port")
  if [ ! -d "$D/sql/mysql" ]; then
    mariadb-install-db --no-defaults --user="$me" --datadir="$D/sql" --auth-root-authentication-method=normal \
      --skip-test-db >"$D/log/mariadb-install.log" 2>&1 || fail_up "mariadb-install-db failed"
  fi
  setsid mariadbd --no-defaults --user="$me" --datadir="$D/sql" --socket="$D/run/sql.sock" \
    --bind-address=127.0.0.1 --port="$p" --pid-file="$D/run/mariadbd.pid" --skip-log-bin --skip-name-resolve \
    --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0 \
    --innodb-lock-wait-timeout=900 --log-error="$D/log/mariadb.log" </dev/null >/dev/null 2>&1 &
  wait_for 30 mariadb-admin --no-defaults --socket="$D/run/sql.sock" -u root ping || fail_up "mariadbd did not start"
  mariadb --no-defaults --socket="$D/run/sql.sock" -u root -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
    CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';" \
    || fail_up "the database could not be made"
  slurmdbd || fail_up "slurmdbd did not start"
  wait_for 30 timeout 5 sacctmgr -n list cluster || fail_up "slurmdbd does not answer"
  timeout 10 sacctmgr -i add cluster stc >/dev/null 2>&1      # else slurmctld registers it itself
  timeout 10 sacctmgr -i add account test >/dev/null 2>&1
  timeout 10 sacctmgr -i add user "$me" account=test >/dev/null 2>&1 || true
}

nodes_idle() {
  [ "$(timeout 5 sinfo -h -p gpu -N -o '%t' 2>/dev/null | grep -cx idle)" -eq "$N_NODES" ]
}
is_up() {
  local n
  alive "$D/run/slurmctld.pid" >/dev/null || return 1
  alive "$D/run/munged.pid" >/dev/null || return 1
  while read -r n; do alive "$D/run/slurmd-$n.pid" >/dev/null || return 1; done <"$D/run/nodes"
  timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP'
}
print_env() {
  echo "export SLURM_CONF=$SLURM_CONF"
  echo "export SLURM_TEST_CLUSTER=$D"
  # Snakemake's slurm-jobstep plugin (0.6.x) drops SLURM_CONF before its nested srun: without
  # this wrapper first in PATH every job fails with "Could not establish a configuration source"
  echo "case \":\$PATH:\" in *:$D/bin:*) ;; *) export PATH=$D/bin:\$PATH ;; esac"
}

cmd_up() {
  N_NODES=${STC_NODES:-2} CPUS=${STC_CPUS:-4} MEM=${STC_MEM:-4000} GPUS=${STC_GPUS:-1}
  GPU_TYPE=${STC_GPU_TYPE:-h100} ACCT=${STC_ACCOUNTING:-0}
  local list d=${1:-}
  list=$(missing "$ACCT")
  [ -z "$list" ] || die "commands not found: $(sed 's/:.*//' <<<"$list" | paste -sd' ')
  apt-get update && apt-get install -y --no-install-recommends $(packages <<<"$list" | paste -sd' ')"
  case ${STC_HIDE_FROM:-} in
    '') ;;
    n[1-9]:/*)
      [ "$(id -u)" = 0 ] || die "STC_HIDE_FROM needs root: it mounts over the directory"
      [ "${STC_HIDE_FROM:1:1}" -le "$N_NODES" ] || die "STC_HIDE_FROM: no such node: $STC_HIDE_FROM" ;;
    *) die "STC_HIDE_FROM must be NODE:/PATH, got '$STC_HIDE_FROM'" ;;
  esac
  if [ -z "$d" ]; then d=$(mktemp -d /tmp/stc.XXXXXX) || die "mktemp failed"; fi
  mkdir -p "$d" || die "cannot make $d"
  set_dir "$d"
  [ ${#D} -le 60 ] || die "the directory's path is too long for unix sockets (${#D} > 60): $D"
  if [ -f "$D/run/nodes" ] && is_up; then say "already up in $D"; print_env; return 0; fi
  [ -d "$D/run" ] && cmd_down >/dev/null 2>&1         # half-dead leftovers
  rm -rf "${D:?}"/{etc,run,log,state,spool,munge,dev,bin}
  chmod go+rx "$D"
  mkdir -p "$D"/{etc,run,log,state,spool,munge,dev,bin,sql}
  chmod 755 "$D"/{etc,run,log,spool,dev,bin}; chmod 711 "$D/munge"
  write_config
  # munge
  (umask 077; head -c 128 /dev/urandom >"$D/munge/munge.key")
  munged --socket="$D/munge/munge.sock" --key-file="$D/munge/munge.key" --pid-file="$D/run/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" 2>"$D/log/munged.err.log" \
    || fail_up "munged did not start"
  [ "$ACCT" = 1 ] && start_accounting
  slurmctld -c -f "$SLURM_CONF" || fail_up "slurmctld did not start"
  local n
  while read -r n; do start_node "$n" || fail_up "slurmd $n did not start"; done <"$D/run/nodes"
  wait_for "${STC_WAIT:-30}" nodes_idle || { sinfo -N -l >&2; fail_up "the nodes are not idle after ${STC_WAIT:-30} s"; }
  [ -z "${STC_OWNER:-}" ] || { watch_owner "$STC_OWNER" </dev/null >/dev/null 2>&1 & }
  say "up in $D: $N_NODES node(s), $GPUS GPU(s) each"
  print_env
}

watch_owner() {  # watch_owner PID: a killed owner cannot clean up; ends by itself after `down`
  trap '' HUP INT
  while [ -f "$D/run/munged.pid" ]; do
    kill -0 "$1" 2>/dev/null || { cmd_down; rm -rf "$D"; return; }
    sleep 1
  done
}

cmd_down() {
  local n p i
  if alive "$D/run/slurmctld.pid" >/dev/null; then
    timeout 10 scancel --user="$(id -un)" >/dev/null 2>&1
    [ "$(id -u)" = 0 ] && timeout 10 scancel --state=PENDING,RUNNING,SUSPENDED >/dev/null 2>&1
    for ((i = 0; i < 60; i++)); do
      [ -z "$(timeout 5 squeue -h -t RUNNING,COMPLETING,PENDING 2>/dev/null)" ] && break; sleep 0.1
    done
  fi
  local nodes=()
  [ -f "$D/run/nodes" ] && while read -r n; do nodes+=("$D/run/slurmd-$n.pid"); done <"$D/run/nodes"
  stop_pids 10 "$D/run/slurmctld.pid" "${nodes[@]}"
  stop_pids 10 "$D/run/slurmdbd.pid"
  stop_pids 20 "$D/run/mariadbd.pid" "$D/run/munged.pid"
  kill_steps ''
  rm -f "$D"/run/*.pid
  say "down: $D"
}

# slurmstepd processes (and what they run) outlive a killed slurmd: end those of this
# cluster (of node $1 only, when given), by pid.
kill_steps() {
  local p c pids=() node=$1
  for p in $(grep -lx slurmstepd /proc/[0-9]*/comm 2>/dev/null); do
    p=${p#/proc/}; p=${p%/comm}
    ours "$p" || continue
    if [ -n "$node" ]; then
      tr '\0' '\n' <"/proc/$p/environ" | grep -qxF "STC_NODE=$node" || continue
    fi
    # shellcheck disable=SC2207  # numbers, split on purpose
    pids+=("$p" $(descendants "$p"))
  done
  [ ${#pids[@]} -eq 0 ] || kill -KILL "${pids[@]}" 2>/dev/null
  return 0
}
descendants() {
  local c
  for c in $(cat /proc/"$1"/task/*/children 2>/dev/null); do echo "$c"; descendants "$c"; done
}

cmd_status() {
  local f p
  for f in munged mariadbd slurmdbd slurmctld $(sed 's/^/slurmd-/' "$D/run/nodes" 2>/dev/null); do
    p=$(alive "$D/run/$f.pid") && echo "$f: pid $p" || echo "$f: not running"
  done
  alive "$D/run/slurmctld.pid" >/dev/null && sinfo -N -o '%N %t %c %m %G %E'
  return 0
}

case ${1:-} in
  up) cmd_up "${2:-}" ;;
  down) set_dir "${2:-}"; cmd_down ;;
  env) set_dir "${2:-}"; [ -f "$SLURM_CONF" ] || die "no cluster in $D"; print_env ;;
  status) set_dir "${2:-}"; cmd_status ;;
  node-kill) set_dir "${3:-}"; p=$(alive "$D/run/slurmd-$2.pid") || die "node $2 does not run"
    kill -KILL "$p"; kill_steps "$2"; rm -f "$D/run/slurmd-$2.pid"; say "killed slurmd $2 (pid $p)" ;;
  node-start) set_dir "${3:-}"; alive "$D/run/slurmd-$2.pid" >/dev/null && { say "node $2 already runs"; exit 0; }
    STC_NODE=$2; export STC_NODE; start_node "$2" || die "slurmd $2 did not start" ;;
  missing) missing "${STC_ACCOUNTING:-0}" | packages ;;
  *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
