#!/usr/bin/env bash
# One run on Cloud TPU slices: request them, wait, install, run on every host, delete them.
#
#   launch/tpu_pod.sh NAME ZONE ACCELERATOR [--num-slices=N] [--spot] [--keep] [--dry-run] -- \
#       --config=configs/qwen_bis10.py --workdir=gs://BUCKET/qwen_bis10 \
#       --config.corpus.cache=gs://BUCKET/cache --config.corpus.images=gs://BUCKET/images.zip \
#       --config.corpus.annotations=gs://BUCKET/annotations.zip \
#       --config.evaluation.benchmark=gs://BUCKET/VisualProcessBench [--config.KEY=VALUE ...]
#
# ACCELERATOR is a type like v5p-32, v5litepod-64 or v6e-16. Project: that of `gcloud config`. The hosts
# need nothing but the bucket, which the service account of the TPUs must be allowed to use.
#   --num-slices=2    slices; give the run --config.mesh.data as a multiple of it
#   --before=COMMAND  runs first on every host
#   --spot            cheaper; may be preempted: the same command resumes the run
#   --keep            do not delete the slices afterwards; the same NAME reuses them
#   --dry-run         print the commands without running them
set -euo pipefail

usage() {
  sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p;}' "$0" >&2
  exit 2
}
[[ $# -ge 3 && $1 != -* && $2 != -* && $3 != -* ]] || usage
name=$1 zone=$2 accelerator=$3
shift 3
spot=() keep= dry= before=true slices=1
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --spot) spot=(--spot) ;;
    --keep) keep=1 ;;
    --dry-run) dry=1 ;;
    --before=*) before=${1#*=} ;;
    --num-slices=[1-9]*) slices=${1#*=} ;;
    *) echo "$0: unknown argument $1" >&2 && usage ;;
  esac
  shift
done
[[ $# -gt 1 ]] || usage # the -- and at least one flag of the run
shift

case $accelerator in # the images that Google names for each generation
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  *) image=tpu-ubuntu2204-base ;;
esac

call() {
  if [[ $dry ]]; then
    echo "${*@Q}"
  else
    "$@"
  fi
}
queue() { call gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"; }
everywhere() { queue ssh --node=all --worker=all --command="$1"; }
state() {
  if [[ $dry ]]; then
    echo "$1"
  else
    queue describe --format='value(state.state)' 2>/dev/null || echo NONE
  fi
}
delete() { [[ $keep ]] || queue delete --force --quiet; }

nodes=(--node-id="$name")
((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$name")
case $(state NONE) in
  SUSPENDED | FAILED) queue delete --force --quiet ;& # taken away or refused: ask again
  NONE)
    queue create "${nodes[@]}" --accelerator-type="$accelerator" --runtime-version="$image" \
      ${spot[@]+"${spot[@]}"}
    ;;
esac
trap delete EXIT
until [[ $(state ACTIVE) == ACTIVE ]]; do
  case $(state ACTIVE) in
    FAILED | SUSPENDED | SUSPENDING) echo "$0: the request for $accelerator was refused" >&2 && exit 1 ;;
  esac
  sleep 30
done

cd "$(dirname "$0")/.."
source=${TMPDIR:-/tmp}/$name.tar.gz # of what is committed
call git archive --format=tar.gz --output="$source" HEAD
call gcloud compute tpus queued-resources scp "$source" "$name:bis_jax.tar.gz" --zone="$zone" \
  --node=all --worker=all
# The images have an older Python; uv installs a newer one.
everywhere "mkdir -p bis_jax && tar -xzf bis_jax.tar.gz -C bis_jax && cd bis_jax && \
pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python=3.11 .venv && \
python3 -m uv pip install --quiet --python=.venv/bin/python -e '.[tpu]' && $before"
everywhere "cd bis_jax && exec .venv/bin/python -m bis_jax.main ${*@Q}"
