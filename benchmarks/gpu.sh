#!/usr/bin/env bash
# All that a GPU is to show, in pieces of less than ten minutes.
#
#     benchmarks/gpu.sh DATA OUT [KEY=VALUE...]
#
# From the root of the repository; needs torch 2.11 or newer with the other dependencies, and CIFAR-10 as parquet in DATA.
# The same command goes on where it was stopped, until it says "all done": what is finished is not done again, and
# trainings go on from their checkpoints. In this order: the device against the CPU, and peak memory; steps of training
# against published loops and bare passes; a pair on all of CIFAR-10 with ResNet-18, 15 epochs of TRADES (beta 6, PGD-10,
# one cycle) and guided distillation at the same cost; AutoAttack on the first of them against the reference.
# KEY=VALUE: for both trainings. In the environment: MINUTES of a piece (9); DEVICE (auto); SIZE=tiny for a trial on a CPU
# within minutes; IMAGES attacked of each model of the pair (1000).
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n '2,14p' "$0" >&2; exit 2; }
data=$1 out=$2
extra=("${@:3}")
: "${MINUTES:=9}" "${DEVICE:=auto}" "${SIZE:=full}" "${IMAGES:=1000}"
here=$(dirname "$0")
python=${PYTHON:-python}
mkdir -p "$out"
end=$(($(date +%s) + MINUTES * 60))
"$python" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' ||
  { echo "torch 2.11 or newer is needed" >&2; exit 2; }

case $SIZE in
  full) backbone=resnet-18 batch=128 side=32 rounds=5 minutes=2 samples=500 epochs=15 guided=7 distilled=7 ;;
  tiny) backbone=cnn-2 batch=4 side=8 rounds=1 minutes=0.1 samples=4 epochs=1 guided=1 distilled=1
    extra=(data.train_limit=60 data.validation=20 "stages.*.attack.steps=2" "stages.*.batch_size=20"
      "model.backbone={name: wideresnet, depth: 10, width: 1, stem_stride: 2}" validation.attack.steps=1
      runtime.precision=float32 evaluate.limit=4 "${extra[@]}") ;;
  *) echo "SIZE=$SIZE: use full or tiny" >&2; exit 2 ;;
esac

# part NAME COMMAND...: once, in what is left of this piece; a command that was stopped goes on next time.
part() {
  local name=$1 left=$((end - $(date +%s))) code=0
  shift
  [[ -e $out/$name.done ]] && return 0
  ((left > 20)) || { echo "$name: next time; say the same again"; exit 3; }
  echo "$name"
  timeout --signal INT --kill-after 30 "$left" "$@" >> "$out/$name.log" 2>&1 || code=$?
  ((code == 0)) && { touch "$out/$name.done"; return 0; }
  (($(date +%s) >= end)) && { echo "$name: unfinished; say the same again"; exit 3; }
  echo "$name: failed with $code; see $out/$name.log" >&2
  tail -5 "$out/$name.log" >&2
  exit 1
}

# trained NAME RECIPE KEY=VALUE...: one of the pair, and what attacks leave of it.
trained() {
  local name=$1 recipe=$here/strongest/$2.yaml
  shift 2
  part "train-$name" "$python" -m dualhead train "$recipe" "data.source=$data" "runtime.device=$DEVICE" "$@" "${extra[@]}" \
    --run-dir "$out/$name" --quiet
  part "attack-$name" "$python" -m dualhead evaluate "$out/$name" --data "$data" --attack pgd-20 \
    --attack autoattack-fast --limit "$IMAGES" --device "$DEVICE" --output "$out/$name/evaluations/strong" --quiet
}

part device "$python" "$here/device_check.py" --device "$DEVICE" --backbone "$backbone" --batch-size "$batch" \
  -o "$out/device.json"
part training "$python" "$here/training.py" --backbones "$backbone" --batch-size "$batch" --side "$side" \
  --rounds "$rounds" --minutes "$minutes" --device "$DEVICE" -o "$out/training.json"
trained base gpu_base "stages.base.epochs=$epochs"
trained distilled gpu_distilled "stages.guided.epochs=$guided" "stages.distilled.epochs=$distilled"
part compare "$python" -m dualhead compare "$out/base/evaluations/strong" "$out/distilled/evaluations/strong" \
  --output "$out/comparison.json" --quiet
if "$python" -c 'import pyautoattack' 2> /dev/null; then
  part autoattack "$python" "$here/autoattack.py" "$out/base" --data "$data" --samples "$samples" --eps 0.031 \
    --device "$DEVICE" -o "$out/autoattack.json"
else
  echo "autoattack: left out, since the reference is not installed (pip install pyautoattack)"
fi
echo "all done: $out"
