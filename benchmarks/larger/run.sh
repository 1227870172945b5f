#!/usr/bin/env bash
# TRADES against guided distillation at equal cost, on more images and larger networks; README.md has the protocol.
#
#     benchmarks/larger/run.sh DATA OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. DATA: CIFAR-10. All cells of one seed
# run before those of the next, cheap ones first, and the control last. The same command goes on where it was stopped,
# also on another machine: each finished run leaves a small file, and is not trained again as long as that is there. In
# the environment: METHODS, a pattern of cells (`stem`, `width`); SEEDS (0 1 2); IMAGES, test images of each attack
# (1000); PRECISION=float32 on a CPU without bf16; KEPT, a folder for the small files (../results/larger). KEY=VALUE
# goes to all recipes.
set -euo pipefail
data=$1 out=$2
extra=("${@:3}")
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=0 1 2}" "${IMAGES:=1000}" "${PRECISION:=bf16}" "${KEPT:=$here/../results/larger}"
known=
mkdir -p "$out"

# trained NAME RECIPE IMAGES NETWORK [KEY=VALUE...]: one run, attacked on test images, and the small file that stays of it.
trained() {
  local run=$out/$1/seed=$seed kept=$KEPT/$1/seed=$seed.json recipe=$here/../strongest/cpu_$2.yaml found=(strong)
  local images=$3 network=$4
  [[ ! -f $kept ]] || return 0
  echo "$1 seed $seed"
  shift 4
  dualhead train "$recipe" "data.source=$data" "data.train_limit=$((images + 1000))" "model.backbone=$network" \
    validation.every=1000 evaluate.attacks=[pgd-10] evaluate.limit=200 "runtime.precision=$PRECISION" "$@" \
    "${extra[@]}" "runtime.seed=$seed" --run-dir "$run" --quiet
  attacked "$run" strong
  if [[ $recipe == *distilled* ]]; then
    found+=(head2)
    attacked "$run" head2 --output-of head2
  fi
  python "$here/collect.py" keep "$run" "$kept" "${found[@]}"
  python "$here/collect.py" tell "$KEPT" "$out/larger.json" > "$out/answers"
}

# attacked RUN FOUND [OPTION...]
attacked() {
  [[ ! -f $1/evaluations/$2/results.json ]] || return 0
  dualhead evaluate "$1" --data "$data" --attack autoattack-fast --limit "$IMAGES" --output "$1/evaluations/$2" --quiet \
    "${@:3}"
}

# cell NAME IMAGES NETWORK EPOCHS GUIDED DISTILLED: TRADES, and guided distillation at its cost, for one seed.
cell() {
  [[ $1 == $METHODS ]] || return 0
  known=1
  trained "$1-trades" base "$2" "$3" "stages.base.epochs=$4" stages.base.objective.beta=12
  trained "$1-guided" distilled "$2" "$3" "stages.guided.epochs=$5" "stages.distilled.epochs=$6" \
    stages.guided.objective.head1.beta=6
}

network() { echo "{name: wideresnet, depth: 10, width: $1, stem_stride: $2}"; }

for seed in $SEEDS; do
  cell images 9000 "$(network 1 2)" 21 9 10
  cell width 9000 "$(network 2 2)" 21 9 10
  cell stem 9000 "$(network 1 1)" 21 9 10
done
for seed in $SEEDS; do # as many steps as those above, on the images of the first point of the curve
  cell control 2250 "$(network 1 2)" 84 36 40
done

[[ -n $known ]] || { echo "METHODS=$METHODS: no cell is called so" >&2; exit 2; }
