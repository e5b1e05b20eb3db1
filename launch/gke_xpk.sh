#!/usr/bin/env bash
# One run as a workload of a GKE cluster with TPUs, through xpk (pip install xpk).
#
#   launch/gke_xpk.sh NAME CLUSTER TPU_TYPE [--restarts=N] [--image=IMAGE] [--dry-run] -- \
#       --config=configs/qwen_bis10.py --workdir=gs://BUCKET/qwen_bis10 [--config.KEY=VALUE ...]
#
# Project and zone: those of `gcloud config`. Data, weights and corpus.cache must be in folders that
# all pods share: `xpk storage` attaches a bucket or Filestore to the cluster.
#   --restarts=10  how often a failed or preempted workload is restarted and resumes
#   --image=python:3.11-slim   base image to which this checkout is added
#   --dry-run      print the command without running it
set -euo pipefail

usage() {
  sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p;}' "$0" >&2
  exit 2
}
[[ $# -ge 3 && $1 != -* && $2 != -* && $3 != -* ]] || usage
name=$1 cluster=$2 type=$3
shift 3
restarts=10 image=python:3.11-slim dry=
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --dry-run) dry=1 ;;
    *) echo "$0: unknown argument $1" >&2 && usage ;;
  esac
  shift
done
[[ $# -gt 1 ]] || usage # the -- and at least one flag of the run
shift

cd "$(dirname "$0")/.."
command=(
  xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type"
  --num-slices=1 --max-restarts="$restarts" --base-docker-image="$image" --script-dir=.
  --command="pip install --quiet -e '.[tpu]' && exec python -m bis_jax.main ${*@Q}"
)
if [[ $dry ]]; then
  echo "${command[*]@Q}"
else
  "${command[@]}"
fi
