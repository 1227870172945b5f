#!/usr/bin/env bash
# Clean and attacked images as two domains: what is shared between them, what is kept apart, at equal cost.
#
#     benchmarks/domains/run.sh DATA OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. README.md beside it is the protocol.
# Variants that decide the hypotheses run first, all seeds of one before the next. The same command goes on where it was
# stopped, and collects what is finished into OUT/domains.json. In the environment: METHODS, a pattern of variants
# (`dual*`); SEEDS (3 4 5); EPOCHS of hybrid training (40); IMAGES, test images of each attack (2000); PRECISION=float32
# on a CPU without bf16; KEPT, a folder for the finished seeds' accuracies and verdicts, one small file each
# (../results/domains): a seed that has its file there is not trained again. KEY=VALUE goes to all recipes.
set -euo pipefail
data=$1 out=$2
extra=("${@:3}")
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=3 4 5}" "${EPOCHS:=40}" "${IMAGES:=2000}" "${PRECISION:=bf16}"
: "${KEPT:=$here/../results/domains}"
known=
mkdir -p "$out"

epochs=$EPOCHS precision=$PRECISION # of the studies that follow

# study NAME RECIPE [KEY=VALUE...]: runs of a recipe of this folder, trained and then attacked.
study() {
  local name=$1 recipe=$here/$2.yaml routes=() run seed
  [[ $name == $METHODS ]] || return 0
  known=1
  if [[ $name == dual ]]; then
    routes=(--routes all)
  elif [[ $2 != single && $2 != aligned_* ]]; then
    routes=(--routes own,crossed,merged,transfer,gaps)
  fi
  shift 2
  echo "$name"
  for seed in $SEEDS; do
    [[ ! -f $KEPT/$name/seed=$seed.json ]] || continue
    run=$out/$name/seed=$seed
    dualhead train "$recipe" "data.source=$data" "stages.base.epochs=$epochs" "runtime.precision=$precision" \
      "$@" "${extra[@]}" "runtime.seed=$seed" --run-dir "$run" --quiet
    dualhead evaluate "$run" --data "$data" "${routes[@]}" --attack apgd-ce --attack apgd-t --limit "$IMAGES" \
      --output "$run/evaluations/domains" --quiet
    dualhead evaluate "$run" --data "$data" --attack corruptions --limit "$IMAGES" \
      --output "$run/evaluations/corruptions" --quiet
    python "$here/collect.py" keep "$run" "$KEPT/$name/seed=$seed.json"
  done
  python "$here/collect.py" tell "$KEPT" "$out/domains.json" > "$out/answers"
}

network='{name: wideresnet, depth: 10, width: 1, stem_stride: 2}'
with_norm() { echo "model.backbone={name: with_norm, norm: $1, backbone: $network}"; }
own() { echo "model.own=[$1]"; }
routes='clean: head1, robust: head2'

# H1 and H2: statistics or affine parameters?
study single-separate single
study dual dual
study dual-affine dual "$(own affine)" stages.base.forward=joint
study dual-statistics dual "$(own statistics)"
study single-joint single stages.base.forward=joint
# H3: without batch norm. Group norm is slower in bf16 than in float32 on a CPU.
precision=float32
study group-dual dual "$(with_norm group)" "$(own affine)"
study group-single single "$(with_norm group)"
precision=$PRECISION
# The other base methods, at the cost of hybrid training: 16 forward passes for each image, TRADES 17, SAT 13.
epochs=$(((EPOCHS * 16 + 8) / 17))
study trades-single single 'stages.base.objective={name: trades, beta: 6}' stages.base.attack.start=gaussian
study trades-dual dual "stages.base.objective={name: trades, beta: 6, $routes}" stages.base.attack.start=gaussian
epochs=$EPOCHS
study mart-single single 'stages.base.objective={name: mart, beta: 5}'
study mart-dual dual "stages.base.objective={name: mart, beta: 5, $routes}"
epochs=$(((EPOCHS * 16 + 6) / 13))
study sat single stages.base.objective=sat
epochs=$EPOCHS
# Other ways to share, and the depth at which routes part.
study single-clean single stages.base.forward=joint_clean
study dual-affine-clean dual "$(own affine)" stages.base.forward=joint_clean
study sandwich dual "$(with_norm sandwich)" "$(own sandwich)"
study dual-first dual "$(own batch_norm@block1)"
study dual-last dual model.attach_at=block2
study none-single single "$(with_norm none)" stages.base.optimiser.lr=0.02

# Aligned heads after THAT, and AR-AT; the third reading costs 17 passes for each image.
for each in aligned_one_head aligned_r1 aligned_r2 aligned_r4 ar_at ar_at_plain; do study "$each" "$each"; done
epochs=$(((EPOCHS * 16 + 8) / 17))
study aligned_r3 aligned_r3 "stages.base.objective.ramp=$epochs"
epochs=$EPOCHS

[[ -n $known ]] || { echo "METHODS=$METHODS: no variant is called so" >&2; exit 2; }
