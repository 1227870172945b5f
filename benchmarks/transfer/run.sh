#!/usr/bin/env bash
# A robust trunk from Tiny ImageNet, then few images of CIFAR-10: what a second head adds; README.md has the protocol.
#
#     benchmarks/transfer/run.sh TINY_IMAGENET CIFAR10 OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. Cells that decide come first: 2,250
# images, all methods of one seed before the next. The same command goes on where it was stopped, also on another
# machine: each finished run leaves a small file, the trunk its weights too, and is not trained again as long as these
# are there. In the environment: METHODS, a pattern of cells (`tuned-*`); SEEDS (0 1 2); IMAGES, test images of each
# attack (1000); RATE, by default that which the held-out images chose; PRECISION=float32 on a CPU without bf16; KEPT, a
# folder for what is kept (../results/transfer). KEY=VALUE goes to all recipes but that of the trunk.
set -euo pipefail
source=$1 data=$2 out=$3
extra=("${@:4}")
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=0 1 2}" "${IMAGES:=1000}" "${RATE:=}" "${PRECISION:=bf16}"
: "${KEPT:=$here/../results/transfer}"
known=
mkdir -p "$out"

# pretrained SEED: the trunk of a seed, in KEPT/trunk/seed=SEED.
pretrained() {
  local run=$out/trunk/seed=$1 kept=$KEPT/trunk/seed=$1
  [[ ! -f $kept.json ]] || return 0
  echo "trunk seed $1"
  dualhead train "$here/pretrain.yaml" "data.source=$source" "runtime.precision=$PRECISION" "runtime.seed=$1" \
    --run-dir "$run" --quiet
  mkdir -p "$kept"
  cp "$run/model/config.json" "$run/model/model.safetensors" "$kept"
  python "$here/collect.py" keep "$run" "$kept.json"
}

# cell NAME SEED RECIPE [KEY=VALUE...]: one run, and the small file that stays of it; a choice sees no test image.
cell() {
  local name=$1 seed=$2 recipe=$3 run=$out/$1/seed=$2 kept=$KEPT/$1/seed=$2.json found=()
  [[ $name == $METHODS ]] || return 0
  known=1
  [[ ! -f $kept ]] || return 0
  echo "$name seed $seed"
  shift 3
  dualhead train "$here/../strongest/cpu_$recipe.yaml" "data.source=$data" validation.every=1000 \
    evaluate.attacks=[pgd-10] evaluate.limit=200 "runtime.precision=$PRECISION" "$@" "${extra[@]}" \
    "runtime.seed=$seed" --run-dir "$run" --quiet
  if [[ $name != rate-* ]]; then
    found=(strong)
    [[ -f $run/evaluations/strong/results.json ]] || dualhead evaluate "$run" --data "$data" --attack autoattack-fast \
      --limit "$IMAGES" --output "$run/evaluations/strong" --quiet
  fi
  python "$here/collect.py" keep "$run" "$kept" "${found[@]}"
  python "$here/collect.py" tell "$KEPT" "$out/transfer.json" > "$out/answers"
}

# start STAGE SEED RATE: the stage begins from the trunk, and all stages but an aggregator's have the rate.
start() {
  echo "stages.$1.init=$KEPT/trunk/seed=$2"
  echo "stages.$1.replace_classifier=true"
  echo "stages.*.optimiser.lr=$3"
}

# size IMAGES SCRATCH LONG GUIDED DISTILLED MAIN FROZEN SECOND AGGREGATOR: all methods, for one seed; epochs of each stage.
size() {
  local limit=data.train_limit=$(($1 + 1000)) from
  local dhat=("stages.second_head.epochs=$8" "stages.aggregator.epochs=$9" stages.aggregator.optimiser.lr=0.025)
  mapfile -t from < <(start base "$seed" "$RATE")
  cell "tuned-$1" "$seed" base "$limit" "${from[@]}" "stages.base.epochs=$2"
  mapfile -t from < <(start guided "$seed" "$RATE")
  cell "distilled-$1" "$seed" distilled "$limit" "${from[@]}" model.second_head=clone \
    "stages.guided.epochs=$4" "stages.distilled.epochs=$5"
  mapfile -t from < <(start main_head "$seed" "$RATE")
  cell "dhat-thawed-$1" "$seed" dhat "$limit" "${from[@]}" "${dhat[@]}" model.second_head=clone \
    "stages.main_head.epochs=$6"
  cell "dhat-frozen-$1" "$seed" dhat "$limit" "${from[@]}" "${dhat[@]}" model.second_head=clone \
    "stages.main_head.train=[head1]" "stages.main_head.epochs=$7"
  cell "scratch-$1" "$seed" base "$limit" "stages.base.epochs=$2"
  cell "scratch-long-$1" "$seed" base "$limit" "stages.base.epochs=$3"
}

pretrained 0
if [[ -z $RATE ]]; then
  for rate in 0.1 0.03 0.01; do
    mapfile -t from < <(start base 0 "$rate")
    METHODS='*' cell "rate-$rate" 100 base data.train_limit=3250 "${from[@]}" stages.base.epochs=64
  done
  RATE=$(python "$here/collect.py" rate "$KEPT")
fi
known=
for seed in $SEEDS; do
  pretrained "$seed"
  size 2250 64 256 27 32 36 40 24 6
done
for seed in $SEEDS; do size 500 128 990 54 64 72 80 48 12; done
for seed in $SEEDS; do size 9000 17 65 8 7 9 10 6 2; done

[[ -n $known ]] || { echo "METHODS=$METHODS: no cell is called so" >&2; exit 2; }
