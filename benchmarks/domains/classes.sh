#!/usr/bin/env bash
# H5: do aligned heads gain more over TRADES on one head where there are more classes? Tiny ImageNet at 32x32, JPEG-75.
#
#     benchmarks/domains/classes.sh TINY_IMAGENET OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. It goes on where it was stopped. In the
# environment: CLASSES (20 100 200), SEEDS, how many (3), IMAGES, test images of each attack (2000).
set -euo pipefail
data=$1 out=$2
extra=("${@:3}")
here=$(dirname "$0")
: "${CLASSES:=20 100 200}" "${SEEDS:=3}" "${IMAGES:=2000}"

for classes in $CLASSES; do
  [[ -f $out/$classes/tiny.npz ]] || python "$here/classes.py" "$data" "$out/$classes" "$classes"
  for recipe in tiny_trades tiny_aligned; do
    dualhead sweep "$here/$recipe.yaml" "data.source=$out/$classes/tiny.npz" "${extra[@]}" --seeds "$SEEDS" \
      --out "$out/$classes/$recipe" --quiet
    for ((seed = 0; seed < SEEDS; seed++)); do
      run=$out/$classes/$recipe/seed=$seed
      [[ -f $run/evaluations/strong/results.json ]] || dualhead evaluate "$run" --attack apgd-ce --attack apgd-t \
        --limit "$IMAGES" --output "$run/evaluations/strong" --quiet
    done
  done
  dualhead compare "$out/$classes"/tiny_{trades,aligned}/seed=*/evaluations/strong
done
