#!/usr/bin/env bash
# Runs a recipe once for every fraction x strategy x seed, one workdir each.
#
#   launch/sweep.sh FOLDER --fractions=0.05,0.1 --strategies=bis,random --seeds=0,1,2 -- \
#       --config=configs/qwen_bis10.py [--config.KEY=VALUE ...]
#
# The run of fraction 0.1, bis, seed 2 is in FOLDER/bis_0.1_seed2 and its output in
# FOLDER/bis_0.1_seed2.log; that of a folder gs://BUCKET/sweep in sweep/ here. Finished runs are
# skipped and stopped runs resume, so the same command resumes a sweep. A run that fails does not
# stop the others; failed runs are listed at the end and the exit code is 1. SIGTERM and Ctrl-C stop
# the current run, which saves, and the sweep (75).
#
# $RUN is the command of one run, by default `python -m bis_jax.main`; for two local processes:
#   RUN="launch/local_pod.sh 2 4" launch/sweep.sh ...
set -euo pipefail

usage() {
  sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p;}' "$0" >&2
  exit 2
}
[[ $# -ge 1 && $1 != -* ]] || usage
folder=$1
shift
fractions= strategies= seeds=
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --fractions=*) fractions=${1#*=} ;;
    --strategies=*) strategies=${1#*=} ;;
    --seeds=*) seeds=${1#*=} ;;
    *) echo "$0: unknown argument $1" >&2 && usage ;;
  esac
  shift
done
[[ $# -gt 1 && $fractions && $strategies && $seeds ]] || usage
shift
read -ra run <<<"${RUN:-python -m bis_jax.main}"

logs=$folder
[[ $folder != *://* ]] || logs=$(basename "$folder")
mkdir -p "$logs"
is_finished() {
  if [[ $folder != *://* ]]; then
    [[ -e $folder/$1/evaluation.json ]]
    return
  fi
  python -c 'import sys; from bis_jax import files; sys.exit(not files.absolute(sys.argv[1]).exists())' \
    "$folder/$1/evaluation.json"
}
child= stopped=
trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' INT TERM

failed=()
for fraction in ${fractions//,/ }; do
  for strategy in ${strategies//,/ }; do
    for seed in ${seeds//,/ }; do
      name=${strategy}_${fraction}_seed$seed
      if is_finished "$name"; then
        echo "$name: already finished"
        continue
      fi
      echo "$name: running, see $logs/$name.log"
      "${run[@]}" "$@" --workdir="$folder/$name" --config.selection.fraction="$fraction" \
        --config.selection.strategy="$strategy" --config.seed="$seed" >>"$logs/$name.log" 2>&1 &
      child=$! code=0
      wait "$child" || code=$?
      while kill -0 "$child" 2>/dev/null; do # a signal ended the first wait
        code=0
        wait "$child" || code=$?
      done
      child=
      if [[ $stopped ]]; then
        echo "$name: stopped; run the same command to resume"
        exit 75
      fi
      if ((code)); then
        echo "$name: failed with $code" && failed+=("$name")
      fi
    done
  done
done
if ((${#failed[@]})); then
  echo "${#failed[@]} failed: ${failed[*]}" >&2
  exit 1
fi
