#!/usr/bin/env bash
# Guided distillation against TRADES on other data; README.md of this folder has the protocol.
#
#     benchmarks/elsewhere/run.sh choose|compare tiny|fashion FOLDER OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` on the path; FOLDER as data.py writes it. The same command goes on
# where it was stopped. `compare` uses what `choose` led to: EPOCHS, BETA and GUIDED_BETA below, or in the environment.
# SEEDS: which seeds, 0 1 2 unless told.
set -euo pipefail
phase=$1 data=$2 folder=$3 out=$4/$2
extra=("${@:5}")
strongest=$(dirname "$0")/../strongest
: "${SEEDS:=0 1 2}"

case $data in
  tiny)
    size=()
    : "${EPOCHS:=40}" "${BETA:=}" "${GUIDED_BETA:=}"
    ;;
  fashion)
    size=(threat.eps=0.1 stages.*.attack.step_size=0.05 validation.attack.step_size=0.025)
    : "${EPOCHS:=160}" "${BETA:=}" "${GUIDED_BETA:=}"
    ;;
  *) echo "$data: use tiny or fashion" >&2; exit 2 ;;
esac

# trained NAME RECIPE SEED [KEY=VALUE...]
trained() {
  local run=$out/$1/seed=$3 recipe=$strongest/cpu_$2.yaml
  local seed=$3
  shift 3
  [[ -f $run/results.json ]] && return
  dualhead train "$recipe" "data.source=$folder/data" "runtime.seed=$seed" "${size[@]}" runtime.precision=float32 "$@" \
    "${extra[@]}" --run-dir "$run" --quiet
}

base() { trained "base-$1-beta-$2" base "$3" "stages.base.epochs=$1" "stages.base.objective.beta=$2"; }

# As long as costs what TRADES of that many epochs costs: 68 and 75 epochs for 160.
guided() {
  trained "guided-$1-beta-$2" distilled "$3" "stages.guided.epochs=$((($1 * 68 + 80) / 160))" \
    "stages.distilled.epochs=$((($1 * 75 + 80) / 160))" "stages.guided.objective.head1.beta=$2"
}

# attacked RUN FOUND DATA ATTACKS [OPTION...]
attacked() {
  [[ -f $1/evaluations/$2/results.json ]] && return
  dualhead evaluate "$1" --data "$3" ${4//+/ --attack } --limit 2000 --output "$1/evaluations/$2" --quiet "${@:5}"
}

case $phase in
  choose)
    for epochs in 40 80 160; do
      base "$epochs" 6 0
      attacked "$out/base-$epochs-beta-6/seed=0" held_out "$folder/held_out" +pgd-20+cw-20
    done
    [[ -n $EPOCHS ]] || { echo "the length is to be chosen: set EPOCHS for the rest"; exit 0; }
    for beta in 3 6 12; do
      base "$EPOCHS" "$beta" 0
      attacked "$out/base-$EPOCHS-beta-$beta/seed=0" held_out "$folder/held_out" +pgd-20+cw-20
      guided "$((2 * EPOCHS))" "$beta" 0
      attacked "$out/guided-$((2 * EPOCHS))-beta-$beta/seed=0" held_out "$folder/held_out" +pgd-20+cw-20
    done
    ;;
  compare)
    [[ -n $EPOCHS && -n $BETA && -n $GUIDED_BETA ]] || { echo "EPOCHS, BETA and GUIDED_BETA: choose first" >&2; exit 2; }
    for seed in $SEEDS; do
      base "$((2 * EPOCHS))" "$BETA" "$seed"
      guided "$((2 * EPOCHS))" "$GUIDED_BETA" "$seed"
      base "$EPOCHS" "$BETA" "$seed"
      for name in "base-$((2 * EPOCHS))-beta-$BETA" "base-$EPOCHS-beta-$BETA" "guided-$((2 * EPOCHS))-beta-$GUIDED_BETA"; do
        attacked "$out/$name/seed=$seed" strong "$folder/data" +pgd-40+autoattack-fast
      done
      attacked "$out/guided-$((2 * EPOCHS))-beta-$GUIDED_BETA/seed=$seed" head2 "$folder/data" \
        +pgd-40+autoattack-fast --output-of head2
    done
    ;;
  *) echo "$phase: use choose or compare" >&2; exit 2 ;;
esac
