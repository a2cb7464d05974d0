#!/usr/bin/env bash
# cluster_down.sh FOLDER: cancel the jobs of the cluster in FOLDER and end its daemons, each by the number in its own pid file.
set -uo pipefail
folder=$1
export SLURM_CONF="$folder/slurm.conf"
if [ -s "$folder/run/slurmctld.pid" ] && kill -0 "$(cat "$folder/run/slurmctld.pid")" 2>/dev/null; then
  scancel --user=root 2>/dev/null
  for _ in $(seq 100); do
    [ -z "$(squeue --noheader 2>/dev/null)" ] && break
    sleep 0.1
  done
fi

gone() { case "$(ps -o stat= -p "$1" 2>/dev/null)" in "" | Z*) true ;; *) false ;; esac; }

for file in "$folder"/run/slurmd.*.pid "$folder"/run/slurmctld.pid "$folder"/run/slurmdbd.pid "$folder"/run/mariadbd.pid "$folder"/run/munged.pid; do
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  kill "$pid" 2>/dev/null || continue
  for _ in $(seq 100); do
    gone "$pid" && break
    sleep 0.1
  done
  gone "$pid" || kill -9 "$pid"
done
