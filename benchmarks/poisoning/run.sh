#!/usr/bin/env bash
# Poisoned training data: what each method makes of them.
#
#     benchmarks/poisoning/run.sh DATA OUT digits|pilot [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. README.md beside it is the protocol. The
# same command goes on where it was stopped; collect.py beside it collects what is finished. In the environment:
# CELLS, a pattern of cells (`natural-*`); SEEDS of `digits` (3). PRECISION=float32 on a CPU without bf16, for the pilot.
# KEY=VALUE goes to all recipes. `digits` takes DATA=digits, and minutes.
set -euo pipefail
data=$1 out=$2 part=$3
extra=("${@:4}")
here=$(dirname "$0")
: "${CELLS:=*}" "${SEEDS:=3}" "${PRECISION:=bf16}"
known=

declare -A poisons=(
  [clean]=null
  [patch]='{name: patch, share: 0.05, seed: SEED}'
  [sticker]='{name: patch, clean_label: true, target: 7, seed: SEED}'
  [blend]='{name: blend, share: 0.05, seed: SEED}'
  [sinusoid]='{name: sinusoid, share: 0.5, seed: SEED}'
  [class_noise]='{name: class_noise, seed: SEED}'
  [class_noise_large]='{name: class_noise, eps: 1.0, seed: SEED}'
  [class_blocks]='{name: class_noise, shape: blocks, seed: SEED}'
  [one_pixel]='{name: one_pixel, seed: SEED}'
  [label_flip]='{name: label_flip, share: 0.2, seed: SEED}'
  [sham_noise]='{name: sham, like: {name: class_noise, seed: SEED}}'
  [sham_patch]='{name: sham, like: {name: patch, share: 0.05, seed: SEED}}'
)

# cell METHOD POISON SEED RECIPE [KEY=VALUE...]: one run.
cell() {
  local name=$1-$2 run=$out/$part/$1-$2/seed=$3 seed=$3 recipe=$4 poison=${poisons[$2]}
  [[ $name == $CELLS ]] || return 0
  known=1
  shift 4
  [[ -f $run/report.html ]] && return 0
  echo "$name seed $seed"
  dualhead train "$recipe" --run-dir "$run" "data.source=$data" "runtime.seed=$seed" \
    "data.poison=${poison//SEED/$seed}" "$@" "${extra[@]}" --quiet
}

natural=(stages.base.objective=natural)
pilot=("runtime.precision=$PRECISION")
sat=(stages.base.objective=sat stages.base.attack.start=uniform)

case $part in
  digits)
    small=("evaluate={attacks: [pgd-10], limit: 400, gallery: 0}")
    for ((seed = 0; seed < SEEDS; seed++)); do
      for poison in clean patch one_pixel class_noise_large class_noise; do
        cell natural "$poison" "$seed" digits_natural "${small[@]}"
        cell sat "$poison" "$seed" digits_base "${small[@]}" "${sat[@]}" stages.base.epochs=30
      done
      for poison in sticker blend label_flip sham_noise sham_patch; do
        cell natural "$poison" "$seed" digits_natural "${small[@]}"
      done
    done
    ;;
  pilot)
    for poison in clean patch class_noise one_pixel; do
      cell natural "$poison" 100 "$here/base.yaml" "${pilot[@]}" "${natural[@]}" stages.base.epochs=60
    done
    for poison in clean class_noise one_pixel; do
      cell sat "$poison" 100 "$here/base.yaml" "${pilot[@]}" "${sat[@]}" stages.base.epochs=40
    done
    for poison in sticker blend sinusoid class_blocks label_flip sham_noise; do
      cell natural "$poison" 100 "$here/base.yaml" "${pilot[@]}" "${natural[@]}" stages.base.epochs=60
    done
    for poison in patch sticker; do
      cell sat "$poison" 100 "$here/base.yaml" "${pilot[@]}" "${sat[@]}" stages.base.epochs=40
    done
    ;;
  *) echo "$part: use digits or pilot" >&2; exit 2 ;;
esac
[[ -n $known ]] || { echo "CELLS=$CELLS: no cell is called so" >&2; exit 2; }
