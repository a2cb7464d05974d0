#!/usr/bin/env bash
# cluster_up.sh FOLDER [NODES]: a SLURM of our own on 127.0.0.1, with accounting, everything in FOLDER. Prints the `export` to use it.
# Needs root and Debian's slurmctld slurmd munge slurm-client slurmdbd mariadb-server-core. cluster_down.sh FOLDER ends it.
# Ports from CGTGAN_SLURM_PORT on (17600): controller, accounting, database, then one a node.
# Partitions: `main`, and `low`, whose jobs make way for main's: a SIGTERM, 20 s of grace, queued again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
nodes=${2:-2}
base=${CGTGAN_SLURM_PORT:-17600}
controller_port=$base accounting_port=$((base + 1)) database_port=$((base + 2)) first_node_port=$((base + 3))
host=$(hostname -s)

fail() {
  echo "cluster_up: $1" >&2
  tail -n 5 "$folder"/log/* >&2 || true
  "$here/cluster_down.sh" "$folder"
  exit 1
}

# until SECONDS COMMAND...: true as soon as the command succeeds
until_true() {
  local end=$((SECONDS + $1))
  shift
  until "$@" 2>/dev/null; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.1
  done
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

for port in "$controller_port" "$accounting_port" "$database_port"; do
  if listens "$port"; then
    echo "cluster_up: port $port is taken: end what uses it, or set CGTGAN_SLURM_PORT" >&2
    exit 1
  fi
done

mkdir -p "$folder"/{munge,state,spool,log,run}
chmod 755 "$folder" "$folder/munge" # munge insists on folders that only root may write
chmod 700 "$folder/state" "$folder/spool"

# --- who is who: munge with a key of its own; --force: root alone uses it, so others need not reach its socket
(umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
/usr/sbin/munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --seed-file="$folder/munge/seed" \
  --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" || fail "munged does not start"

# --- accounting: MariaDB and slurmdbd; without them nobody learns how a job ended
password=$(head -c 12 /dev/urandom | od -An -tx1 | tr -d ' \n')
tables=/usr/share/mysql
rm -rf "$folder/database"
mkdir "$folder/database"
{
  printf '%s;\n' "CREATE DATABASE mysql" "USE mysql" "SET @auth_root_socket=NULL" "SET @skip_auth_anonymous=1" # one a line
  cat "$tables/mysql_system_tables.sql" "$tables/mysql_performance_tables.sql" "$tables/mysql_system_tables_data.sql"
} | /usr/sbin/mariadbd --no-defaults --bootstrap --user=root --datadir="$folder/database" --innodb-log-file-size=16M \
  >"$folder/log/database_init.log" 2>&1 || fail "MariaDB's tables cannot be made"
(
  umask 077
  cat >"$folder/user.sql" <<SQL
CREATE OR REPLACE USER slurm@'127.0.0.1' IDENTIFIED BY '$password';
GRANT ALL ON accounting.* TO slurm@'127.0.0.1';
SQL
  cat >"$folder/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CommunicationParameters=NoInAddrAny
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$accounting_port
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$database_port
StorageLoc=accounting
StorageUser=slurm
StoragePass=$password
CommitDelay=0
PidFile=$folder/run/slurmdbd.pid
LogFile=$folder/log/slurmdbd.log
CONF
)
setsid /usr/sbin/mariadbd --no-defaults --user=root --datadir="$folder/database" --init-file="$folder/user.sql" \
  --bind-address=127.0.0.1 --port="$database_port" --socket="$folder/run/database.sock" --pid-file="$folder/run/mariadbd.pid" \
  --skip-log-bin --skip-name-resolve --innodb-log-file-size=16M --innodb-buffer-pool-size=64M \
  --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 >"$folder/log/mariadbd.log" 2>&1 </dev/null &
until_true 30 listens "$database_port" || fail "MariaDB does not start"

# --- the cluster
limit=$((first_node_port + nodes - 1))
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.8)}' /proc/meminfo)
cat >"$folder/slurm.conf" <<CONF
ClusterName=cgtgan
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a short life of credentials: a job is not started again before its last one has run out
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$accounting_port
AccountingStoragePass=$folder/munge/socket
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MailProg=/bin/true
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
NodeName=127.0.0.[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$first_node_port-$limit] CPUs=2 RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$folder/slurm.conf"
/usr/sbin/slurmdbd || fail "slurmdbd does not start"
until_true 30 listens "$accounting_port" || fail "slurmdbd does not start"
sacctmgr --immediate add cluster cgtgan >"$folder/log/sacctmgr.log" 2>&1 || true # a folder used before knows it already
/usr/sbin/slurmctld -f "$SLURM_CONF" || fail "slurmctld does not start"
for number in $(seq "$nodes"); do
  /usr/sbin/slurmd -f "$SLURM_CONF" -N "127.0.0.$number" || fail "slurmd of node $number does not start"
done
ready() { [ "$(sinfo --noheader --Node --partition=main --format=%T | sort | uniq -c | tr -s ' ')" = " $nodes idle" ]; }
until_true 60 ready || fail "the nodes do not come up"
echo "export SLURM_CONF=$SLURM_CONF"
