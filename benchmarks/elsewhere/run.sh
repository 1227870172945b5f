#!/usr/bin/env bash
# Guided distillation against TRADES on other data; README.md of this folder has the protocol.
#
#     benchmarks/elsewhere/run.sh choose|compare tiny|fashion FOLDER OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path; FOLDER as data.py writes it. The same
# command goes on where it was stopped, also on another machine: each finished run leaves a small file, and is not
# trained again as long as that is there. In the environment: METHODS, a pattern of runs (`guided-*`), so that several
# processes can share the work; KEPT, a folder for these files (../results/elsewhere); SEEDS of `compare` (0 1 2); EPOCHS, the length that README.md tells, empty to choose it anew; BETA and GUIDED_BETA, by
# default those that the runs of `choose` lead to.
set -euo pipefail
phase=$1 data=$2 folder=$3 out=$4
extra=("${@:5}")
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=0 1 2}" "${BETA:=}" "${GUIDED_BETA:=}" "${KEPT:=$here/../results/elsewhere}"
known=

case $data in
  tiny)
    size=()
    : "${EPOCHS=40}"
    ;;
  fashion)
    size=(threat.eps=0.1 stages.*.attack.step_size=0.05 validation.attack.step_size=0.025)
    : "${EPOCHS=160}"
    ;;
  *) echo "$data: use tiny or fashion" >&2; exit 2 ;;
esac
[[ $phase == choose || $phase == compare ]] || { echo "$phase: use choose or compare" >&2; exit 2; }
mkdir -p "$out"

# cell NAME RECIPE SEED [KEY=VALUE...]: one run, attacked as its phase says, and the small file that stays of it.
cell() {
  local name=$1 recipe=$here/../strongest/cpu_$2.yaml seed=$3 found=(strong)
  local run=$out/$data/$name/seed=$seed kept=$KEPT/$data/$phase/$name/seed=$seed.json
  [[ $name == $METHODS ]] || return 0
  known=1
  [[ ! -f $kept ]] || return 0
  echo "$data $name seed $seed"
  shift 3
  dualhead train "$recipe" "data.source=$folder/data" "runtime.seed=$seed" "${size[@]}" runtime.precision=float32 "$@" \
    "${extra[@]}" --run-dir "$run" --quiet
  if [[ $phase == choose ]]; then
    found=(held_out)
    attacked "$run" held_out "$folder/held_out" +pgd-20+cw-20
  else
    attacked "$run" strong "$folder/data" +pgd-40+autoattack-fast
    if [[ $name == guided-* ]]; then
      found+=(head2)
      attacked "$run" head2 "$folder/data" +pgd-40+autoattack-fast --output-of head2
    fi
  fi
  python "$here/collect.py" keep "$run" "$kept" "${found[@]}"
  python "$here/collect.py" tell "$KEPT" "$out/elsewhere.json" > "$out/answers"
}

base() { cell "base-$1-beta-$2" base "$3" "stages.base.epochs=$1" "stages.base.objective.beta=$2"; }

# As long as costs what TRADES of that many epochs costs: 68 and 75 epochs for 160.
guided() {
  cell "guided-$1-beta-$2" distilled "$3" "stages.guided.epochs=$((($1 * 68 + 80) / 160))" \
    "stages.distilled.epochs=$((($1 * 75 + 80) / 160))" "stages.guided.objective.head1.beta=$2"
}

# told: refuses METHODS that fit no run.
told() { [[ -n $known ]] || { echo "METHODS=$METHODS: no run is called so" >&2; exit 2; }; }

# attacked RUN FOUND DATA ATTACKS [OPTION...]
attacked() {
  [[ ! -f $1/evaluations/$2/results.json ]] || return 0
  dualhead evaluate "$1" --data "$3" ${4//+/ --attack } --limit 2000 --output "$1/evaluations/$2" --quiet "${@:5}"
}

if [[ -z $EPOCHS ]]; then
  [[ $phase == choose ]] || { echo "EPOCHS: choose it first" >&2; exit 2; }
  for epochs in 40 80 160; do base "$epochs" 6 0; done
  EPOCHS=$(python "$here/collect.py" length "$KEPT/$data")
fi
if [[ $phase == choose ]]; then
  for beta in 3 6 12; do
    base "$((2 * EPOCHS))" "$beta" 0
    guided "$((2 * EPOCHS))" "$beta" 0
  done
  told
  chosen=$(python "$here/collect.py" betas "$KEPT/$data" "$EPOCHS")
  echo "EPOCHS=$EPOCHS BETA=${chosen% *} GUIDED_BETA=${chosen#* }"
else
  if [[ -z $BETA || -z $GUIDED_BETA ]]; then
    chosen=$(python "$here/collect.py" betas "$KEPT/$data" "$EPOCHS")
    : "${BETA:=${chosen% *}}" "${GUIDED_BETA:=${chosen#* }}"
  fi
  for seed in $SEEDS; do # equal cost first
    base "$((2 * EPOCHS))" "$BETA" "$seed"
    guided "$((2 * EPOCHS))" "$GUIDED_BETA" "$seed"
    base "$EPOCHS" "$BETA" "$seed"
  done
  told
fi
