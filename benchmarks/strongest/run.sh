#!/usr/bin/env bash
# DH-AT, its variants and the base method at equal cost: trained, attacked and compared.
#
#     benchmarks/strongest/run.sh cpu|gpu DATA OUT [MINUTES [I/N]]
#
# From the root of the repository. It works for MINUTES (default: until done) and then stops cleanly; the same command goes
# on. I/N: every N-th seed from the I-th on, for N of these beside one another. Exit status 0: all is done.
set -euo pipefail
scale=$1 data=$2 out=$3 minutes=${4:-100000} shard=${5:-0/1}
here=$(dirname "$0") seeds=3
end=$((SECONDS + minutes * 60))

# Runs dualhead for what is left of the time; an interrupted run is stopped after its step and has been saved.
timed() {
  local left=$((end - SECONDS))
  ((left > 0)) || { echo "time is up; the same command goes on"; exit 75; }
  timeout --signal INT --kill-after 60 "$left" python -m dualhead "$@" || {
    local status=$?
    ((status == 124)) && { echo "time is up; the same command goes on"; exit 75; }
    exit "$status"
  }
}

# sweep NAME RECIPE [KEY=VALUE...]: three seeds of a recipe of this folder.
sweep() {
  local name=$1 recipe=$2
  shift 2
  echo "== $name"
  timed sweep "$here/${scale}_$recipe.yaml" "data.source=$data" "$@" --seeds "$seeds" --shard "$shard" --out "$out/$name" --quiet
}

# attack NAME ATTACK...: the deployed output of each run that this shard has trained, unless that is done.
attack() {
  local name=$1 run
  shift
  for ((seed = ${shard%/*}; seed < seeds; seed += ${shard#*/})); do
    run=$out/$name/seed=$seed
    [[ -e $run/attacked ]] && continue
    timed evaluate "$run" --data "$data" "${@/#/--attack=}" --limit 3000 --output "$run/strong" --quiet
    touch "$run/attacked"
  done
}

guide() { echo "stages.guided.objective={name: joint, head1: $1, head2: natural, aggregate: null, attack: head1, guidance: 1}"; }
white="pgd-40 autoattack-fast square-500"

sweep trades-base base
sweep trades-guided guided
sweep trades-dhat dhat
