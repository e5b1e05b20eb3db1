#!/usr/bin/env bash
# A pod on this machine: PROCESSES processes with DEVICES fake CPU devices each.
#
#   launch/local_pod.sh PROCESSES DEVICES --config=configs/toy_bis10.py --workdir=runs/pod [...]
#
# The arguments after the two numbers are those of `python -m bis_jax.main` ($PYTHON, if set). Every
# line of output begins with the number of its process. If a process fails, the others have GRACE
# seconds (90: more than a heartbeat) to end by themselves; the exit code is that of the first that
# failed. SIGTERM and Ctrl-C are passed to all processes, which save and exit with 75.
set -euo pipefail

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || ! $2 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 PROCESSES DEVICES --config=FILE --workdir=FOLDER [--config.KEY=VALUE ...]" >&2
  exit 2
fi
processes=$1 devices=$2
shift 2
python=${PYTHON:-python}

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

running=()
# Without the lines of Gloo, by which JAX's CPU devices meet. Its threads write them in pieces, so that
# the pieces of several lines can mix: every line that holds nothing else is left out.
gloo='^(\\[Gloo\\] Rank |[0-9]+| is connected to | peer ranks[.] | ?Expected number of connected peer ranks is : )*$'
mark() {
  trap '' INT TERM
  awk -v mark="[$1] " -v gloo="$gloo" '$0 !~ gloo { print mark $0; fflush() }'
}
stop() { for pid in ${running[@]+"${running[@]}"}; do kill -s "$1" "$pid" 2>/dev/null || true; done; }
trap 'stop TERM' INT TERM
trap 'stop KILL' EXIT
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID=$i "$python" -m bis_jax.main "$@" > >(mark "$i") 2> >(mark "$i" >&2) &
  running+=($!)
done

code=0 until=
while ((${#running[@]})); do
  sleep 0.1 || true
  for i in "${!running[@]}"; do
    kill -0 "${running[i]}" 2>/dev/null && continue
    status=0
    wait "${running[i]}" || status=$?
    unset "running[i]"
    ((status == 0)) && continue
    echo "local_pod: process $i ended with $status" >&2
    if ((code == 0)); then
      code=$status until=$((SECONDS + ${GRACE:-90}))
    fi
  done
  if [[ -n $until && $SECONDS -ge $until ]]; then
    stop KILL
  fi
done
exit "$code"
