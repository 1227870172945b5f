#!/usr/bin/env bash
# Training against Linf, L2 and L1: one of them, or several at once, at equal cost.
#
#     benchmarks/threats/run.sh DATA OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. README.md beside it is the protocol.
# The same command goes on where it was stopped, and tells what is finished in OUT/threats.json. In the environment:
# METHODS, a pattern of variants (`sat-*`); SEEDS (0 1 2); COST, forward passes for each training image (640); IMAGES,
# test images (1000); PRECISION=float32 on a CPU without bf16; KEPT, a folder for the finished seeds' accuracies and
# verdicts, one small file each (../results/threats): a seed that has its file there is not trained again. KEY=VALUE
# goes to all runs.
set -euo pipefail
data=$1 out=$2
extra=("${@:3}")
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=0 1 2}" "${COST:=640}" "${IMAGES:=1000}" "${PRECISION:=bf16}"
: "${KEPT:=$here/../results/threats}"
known=
mkdir -p "$out"

# study NAME PASSES [KEY=VALUE...]: a variant that costs so many forward passes for each image of an epoch.
study() {
  local name=$1 passes=$2 run
  [[ $name == $METHODS ]] || return 0
  known=1
  shift 2
  [[ ! -f $KEPT/$name/seed=$seed.json ]] || return 0
  echo "$name, seed $seed"
  run=$out/$name/seed=$seed
  if [[ ! -f $run/model/config.json ]]; then
    dualhead train "$here/base.yaml" "data.source=$data" "stages.base.epochs=$(((COST + passes / 2) / passes))" \
      "runtime.precision=$PRECISION" "runtime.seed=$seed" "$@" "${extra[@]}" --run-dir "$run" --quiet
  fi
  dualhead evaluate "$run" --data "$data" --threat Linf:8/255 --threat L2:0.5 --threat L1:12 \
    --attack apgd-ce --attack apgd-t --limit "$IMAGES" --output "$run/evaluations/threats" --quiet
  python "$here/collect.py" keep "$run" "$KEPT/$name/seed=$seed.json"
  python "$here/collect.py" tell "$KEPT" "$out/threats.json"
}

for seed in $SEEDS; do
  study sat-linf 13 'threat={norm: Linf, eps: 8/255}'
  study sat-l2 13 'threat={norm: L2, eps: 0.5}'
  study sat-l1 13 'threat={norm: L1, eps: 12}'
  study random 13 'stages.base.objective={name: any_of, choose: uniform}'
  study e-at 13 'stages.base.objective={name: any_of, choose: adaptive}'
  study max 39 'stages.base.objective={name: any_of, choose: worst}'
  study avg 39 'stages.base.objective=avg'
  study msd 28 'stages.base.objective={name: msd, steps: 5}'
  study ramp 26 'stages.base.objective=ramp'
done

[[ -n $known ]] || { echo "METHODS=$METHODS: no variant is called so" >&2; exit 2; }
