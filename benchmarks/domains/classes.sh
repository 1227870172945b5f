#!/usr/bin/env bash
# H5: do aligned heads gain more over TRADES on one head where there are more classes? Tiny ImageNet at 32x32, JPEG-75.
#
#     benchmarks/domains/classes.sh TINY_IMAGENET OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. It goes on where it was stopped, and
# tells what is finished in OUT/classes.json. In the environment: CLASSES (20 200 100), SEEDS (0 1 2), IMAGES, test
# images of each attack (2000), KEPT, a folder for finished seeds, one small file each (../results/classes).
set -euo pipefail
data=$1 out=$2
extra=("${@:3}")
here=$(dirname "$0")
: "${CLASSES:=20 200 100}" "${SEEDS:=0 1 2}" "${IMAGES:=2000}" "${KEPT:=$here/../results/classes}"

for seed in $SEEDS; do
  for classes in $CLASSES; do
    for recipe in trades aligned one_head; do
      kept=$KEPT/$recipe-$classes/seed=$seed.json run=$out/$recipe-$classes/seed=$seed
      [[ ! -f $kept ]] || continue
      echo "$recipe, $classes classes, seed $seed"
      [[ -f $out/$classes/tiny.npz ]] || python "$here/classes.py" "$data" "$out/$classes" "$classes"
      dualhead train "$here/tiny_$recipe.yaml" "data.source=$out/$classes/tiny.npz" "${extra[@]}" \
        "runtime.seed=$seed" --run-dir "$run" --quiet > /dev/null
      dualhead evaluate "$run" --attack autoattack-fast --limit "$IMAGES" --output "$run/evaluations/strong" --quiet
      python "$here/classes_told.py" keep "$run" "$kept"
      python "$here/classes_told.py" tell "$KEPT" "$out/classes.json"
    done
  done
done
