#!/usr/bin/env bash
# DH-AT, what else two heads can do, and the base methods, at equal cost: trained, and attacked on test images.
#
#     benchmarks/strongest/run.sh cpu|gpu DATA OUT [I/N [KEY=VALUE...]]
#
# From the root of the repository, with `dualhead` and its `python` on the path. The same command goes on where it was
# stopped, so that it can be done in pieces: `timeout --signal INT 9m benchmarks/strongest/run.sh ...`; also on another
# machine, since each finished seed leaves a small file in KEPT (../results/strongest/cpu or gpu), and is not trained
# again as long as that is there. I/N: every N-th of the seeds from the I-th on, for N of these side by side. KEY=VALUE:
# for all recipes, e.g. runtime.precision=float32 on a CPU without bf16. In the environment: METHODS, a pattern of
# studies (`mart-*`); SEEDS (0 1 2), MORE_SEEDS, further ones of the pairs that decide (3 4); IMAGES, test images of
# each. Then: `dualhead compare OUT/*/*/evaluations/strong`; OUT/answers tells what is kept. `adaptive` beside `strong`
# holds Square, which needs no gradients and must find nothing new, and for merged heads the attack that knows of them;
# `autoattack` the whole of that, last, of runs whose folders are here. To choose, HELD_OUT=FOLDER attacks the images
# that held_out.py put there instead; what it finds lies in `evaluations/held_out`. README.md has the rows that are
# still to be measured.
set -euo pipefail
scale=$1 data=$2 out=$3 shard=${4:-0/1}
extra=("${@:5}")
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=0 1 2}" "${MORE_SEEDS=3 4}" "${IMAGES:=5000}" "${HELD_OUT:=}"
: "${KEPT:=$here/../results/strongest/$scale}"
known=

# mine SEEDS: those of them that this process does.
mine() {
  local seeds=($1) n
  for ((n = ${shard%/*}; n < ${#seeds[@]}; n += ${shard#*/})); do echo "${seeds[n]}"; done
}

# study NAME RECIPE SEEDS HEADS [KEY=VALUE...]: runs of a recipe of this folder, and harder attacks on what each deploys,
# one head or merged heads.
study() {
  local name=$1 recipe=$2 seeds=$3 heads=$4 seed
  [[ $name == $METHODS ]] || return 0
  known=1
  shift 4
  echo "$name"
  for seed in $(mine "$seeds"); do
    ! is_kept "$name" "$seed" || continue
    trained "$name" "$recipe" "$seed" "$@"
    measured "$name" "$seed" "$heads"
  done
}

# merged NAME RECIPE SEEDS: head 1 of two runs in NAME-half, seeds 2 N and 2 N + 1, merged to their mean. Both scale images
# alike, which the mean and deviation of other training images would not.
merged() {
  local name=$1 half=$1-half scaled='model.normalize={mean: [0.4914, 0.4822, 0.4465], std: [0.2470, 0.2435, 0.2616]}' seed
  [[ $name == $METHODS ]] || return 0
  known=1
  echo "$name"
  for seed in $(mine "$3"); do
    ! is_kept "$name" "$seed" || continue
    trained "$half" "$2" $((2 * seed)) "$scaled"
    trained "$half" "$2" $((2 * seed + 1)) "$scaled"
    python "$here/merge.py" "$out/$half/seed=$((2 * seed))" "$out/$half/seed=$((2 * seed + 1))" "$out/$name/seed=$seed"
    measured "$name" "$seed" merged
  done
}

is_kept() { [[ -z $HELD_OUT && -f $KEPT/$1/seed=$2.json ]]; }

# trained NAME RECIPE SEED [KEY=VALUE...]
trained() {
  dualhead train "$here/${scale}_$2.yaml" "data.source=$data" "${@:4}" "${extra[@]}" "runtime.seed=$3" \
    --run-dir "$out/$1/seed=$3" --quiet
}

# measured NAME SEED HEADS: attacks on a finished run, and the small file that stays of it.
measured() {
  local adaptive=+pgd-40+square-500
  [[ $3 == one ]] || adaptive+=+multihead-20
  if [[ -n $HELD_OUT ]]; then
    attacked "$1" "$2" held_out +pgd-20+cw-20 "$IMAGES"
  else
    attacked "$1" "$2" strong +pgd-40+autoattack-fast "$IMAGES"
    attacked "$1" "$2" adaptive "$adaptive" 1000
    keep "$1" "$2" strong adaptive
  fi
}

# attacked NAME SEED FOUND ATTACKS IMAGES: a run of a study, into its folder evaluations/FOUND.
attacked() {
  local run=$out/$1/seed=$2
  [[ ! -f $run/evaluations/$3/results.json ]] || return 0
  dualhead evaluate "$run" --data "${HELD_OUT:-$data}" ${4//+/ --attack } --limit "$5" --output "$run/evaluations/$3" \
    --quiet
}

# keep NAME SEED FOUND...
keep() {
  python "$here/collect.py" keep "$out/$1/seed=$2" "$KEPT/$1/seed=$2.json" "${@:3}"
  python "$here/collect.py" tell "$KEPT" "$out/strongest.json" > "$out/answers"
}

[[ -z $HELD_OUT || $scale == cpu ]] || { echo "HELD_OUT: the recipes for a GPU train on those images" >&2; exit 2; }

guided() { echo "stages.guided.objective={name: joint, head1: $1, head2: natural, aggregate: null, attack: head1, guidance: ${2:-1}}"; }

sat=(stages.*.objective=sat stages.*.attack.start=uniform)
short=(stages.guided.epochs=68 stages.distilled.epochs=75)
mart='{name: mart, beta: 5}' half='{name: mart, beta: 2.5}'

# A step of each method costs another amount: for as long as makes no other run of the method dearer.
case $scale in
  cpu) sat_epochs=167 mart_epochs=165 ;;
  gpu) sat_epochs=254 mart_epochs=238 ;;
  *) echo "$scale: use cpu or gpu" >&2; exit 2 ;;
esac
mkdir -p "$out"

pair="$SEEDS $MORE_SEEDS" # of the pairs whose difference is to be known best
study trades-base base "$pair" one
study trades-distilled distilled "$pair" merged
study trades-guided guided "$SEEDS" one
study trades-dhat dhat "$SEEDS" merged
study trades-ensemble ensemble "$SEEDS" merged
study sat-base base "$SEEDS" one "${sat[@]}" "stages.base.epochs=$sat_epochs"
study sat-distilled distilled "$SEEDS" merged "$(guided sat)" stages.guided.attack.start=uniform
study sat-dhat dhat "$SEEDS" merged "${sat[@]}"
study mart-base base "$SEEDS" one "stages.base.objective=$mart" "stages.base.epochs=$mart_epochs"
study mart-distilled distilled "$SEEDS" merged "$(guided "$half")"
study mart-dhat dhat "$SEEDS" merged "stages.main_head.objective=$mart" "stages.second_head.objective=$half" \
  "stages.aggregator.objective=$half"
finals=(trades-base trades-distilled trades-ensemble)
if [[ $scale == cpu ]]; then # `distilled` costs twice what the others do: the base methods for as long
  study trades-base-long base "$SEEDS" one stages.base.epochs=320
  study sat-base-long base "$SEEDS" one "${sat[@]}" stages.base.epochs=375
  study mart-base-long base "$SEEDS" one "stages.base.objective=$mart" stages.base.epochs=331
  finals+=(trades-base-long)
  # SAT that keeps the best epoch of its held-out images, the usual remedy for robust overfitting.
  best=(stages.base.keep=best validation.every=5)
  study sat-base-best base "$SEEDS" one "${sat[@]}" "${best[@]}" "stages.base.epochs=$sat_epochs"
  study sat-base-long-best base "$SEEDS" one "${sat[@]}" "${best[@]}" stages.base.epochs=375
  # Less clean, more robust accuracy: a second point of either curve.
  study trades-base-beta-12 base "$pair" one stages.base.objective.beta=12
  study trades-base-long-beta-12 base "$pair" one stages.base.epochs=320 stages.base.objective.beta=12
  study trades-distilled-beta-6 distilled "$pair" merged stages.guided.objective.head1.beta=6
  # A single head of as many parameters as two, at the most robust beta.
  study trades-wide-beta-12 wide "$SEEDS" one stages.wide.objective.beta=12 stages.wide.epochs=84
  study trades-wide-long-beta-12 wide "$SEEDS" one stages.wide.objective.beta=12 stages.wide.epochs=168
  # Two and three models at the cost of `distilled`.
  merged trades-guided-merged guided "$SEEDS"
  study trades-three three "$SEEDS" merged
  # And `distilled` at half its length, which costs what the others do.
  study mart-distilled-short distilled "$SEEDS" merged "$(guided "$half")" "${short[@]}"
fi
if [[ -z $HELD_OUT ]]; then
  for name in "${finals[@]}"; do
    [[ $name == $METHODS ]] || continue
    for seed in $(mine "$SEEDS"); do
      [[ ! -f $out/$name/seed=$seed/evaluations/autoattack/results.json ]] || continue
      if [[ -d $out/$name/seed=$seed ]]; then
        attacked "$name" "$seed" autoattack +autoattack 1000
        keep "$name" "$seed" strong adaptive autoattack
      else
        echo "$name seed $seed: its run is not here, so AutoAttack is left out"
      fi
    done
  done
fi
named() { [[ -n $known ]] || { echo "METHODS=$METHODS: no study of this scale is called so" >&2; exit 2; }; }
[[ $scale == cpu ]] || { named; exit 0; }

# What else was tried, and the curve of the base method; seed 0 each.
study sat-guided guided 0 one "$(guided sat)" stages.guided.attack.start=uniform
study mart-guided guided 0 one "$(guided "$mart")"
for epochs in 20 40 80; do
  study "trades-base-$epochs" base 0 one "stages.base.epochs=$epochs"
done
for beta in 1.5 3; do
  study "trades-base-beta-$beta" base 0 one "stages.base.objective.beta=$beta"
done
awp='awp={gamma: 0.005, start: 10}'
study trades-base-awp base 0 one "stages.base.$awp" stages.base.epochs=118
study trades-base-awp-long base 0 one "stages.base.$awp" stages.base.epochs=236
study trades-base-cutmix base 0 one "stages.base.cutmix={}"
study trades-base-smoothing base 0 one stages.base.objective.label_smoothing=0.1
study trades-base-pairing base 0 one "stages.base.objective={name: logit_pairing, base: {name: trades, beta: 6}}"
study ikl-base base 0 one stages.base.objective=ikl
study trades-wide wide 0 one
study trades-wide-long wide 0 one stages.wide.epochs=176
study trades-guided-3 guided 0 one "$(guided '{name: trades, beta: 6}' 3)"
study trades-guided-beta-3 guided 0 one "$(guided '{name: trades, beta: 3}')"
study trades-guided-awp guided 0 one "stages.guided.$awp" stages.guided.epochs=104
study trades-distilled-beta-12 distilled 0 merged stages.guided.objective.head1.beta=12
for beta in 3 6; do
  study "trades-distilled-short-beta-$beta" distilled 0 merged "stages.guided.objective.head1.beta=$beta" \
    "${short[@]}"
done
study trades-three-short three 0 merged stages.guided.epochs=50 stages.distilled.epochs=47 stages.third.epochs=47
study trades-ensemble-short ensemble 0 merged "stages.*.epochs=80"
study trades-distilled-unguided distilled 0 merged "stages.guided.train=[head1]" \
  "stages.guided.objective={name: trades, beta: 3}" stages.guided.epochs=160
study trades-joint joint 0 merged
study trades-joint-networks joint 0 merged model.attach_at=normalize model.aggregator=mean stages.joint.epochs=80 \
  "stages.joint.train=[head1, head2]"
study trades-joint-distilled joint 0 merged stages.joint.objective.distillation=1
study trades-joint-diverse joint 0 merged stages.joint.objective.diversity=0.5
study trades-finetune finetune 0 merged
study trades-mixed mixed 0 merged
named
