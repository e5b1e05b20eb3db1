#!/usr/bin/env bash
# One run as a workload of a GKE cluster with TPUs, through xpk (pip install xpk) and docker.
#
#   launch/gke_xpk.sh NAME CLUSTER TPU_TYPE --image=REPOSITORY/bis_jax [--num-slices=N] [--restarts=N] \
#       [--dry-run] -- --config=configs/qwen_bis10.py --workdir=gs://BUCKET/qwen_bis10 \
#       --config.corpus.cache=gs://BUCKET/cache --config.corpus.images=gs://BUCKET/images.zip \
#       --config.corpus.annotations=gs://BUCKET/annotations.zip \
#       --config.evaluation.benchmark=gs://BUCKET/VisualProcessBench [--config.KEY=VALUE ...]
#
# Project and zone: those of `gcloud config`. The pods need nothing but the bucket, which their service
# account must be allowed to use.
#   --image=...       where the image of the current commit is, such as
#                     europe-west4-docker.pkg.dev/PROJECT/REPOSITORY/bis_jax; it is built from
#                     launch/Dockerfile and pushed once per commit, and pods install nothing
#   --num-slices=1    slices; give the run --config.mesh.data as a multiple of it
#   --restarts=10     how often a failed or preempted workload is restarted and resumes
#   --dry-run         print the commands without running them
set -euo pipefail

usage() {
  sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p;}' "$0" >&2
  exit 2
}
[[ $# -ge 3 && $1 != -* && $2 != -* && $3 != -* ]] || usage
name=$1 cluster=$2 type=$3
shift 3
restarts=10 image= slices=1 dry=
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --num-slices=[1-9]*) slices=${1#*=} ;;
    --dry-run) dry=1 ;;
    *) echo "$0: unknown argument $1" >&2 && usage ;;
  esac
  shift
done
[[ $# -gt 1 && $image ]] || usage # the -- and at least one flag of the run
shift

call() {
  if [[ $dry ]]; then
    echo "${*@Q}"
  else
    "$@"
  fi
}

cd "$(dirname "$0")/.."
image=$image:$(git rev-parse --short=12 HEAD)
if [[ $dry ]] || ! docker manifest inspect "$image" >/dev/null 2>&1; then
  source=${TMPDIR:-/tmp}/$name.tar.gz # of what is committed
  call git archive --format=tar.gz --output="$source" HEAD
  call docker build --tag="$image" --file=launch/Dockerfile - <"$([[ $dry ]] && echo /dev/null || echo "$source")"
  call docker push "$image"
fi
call xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type" \
  --num-slices="$slices" --max-restarts="$restarts" --docker-image="$image" \
  --command="exec python -m bis_jax.main ${*@Q}"
