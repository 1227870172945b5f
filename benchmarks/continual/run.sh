#!/usr/bin/env bash
# Threats one after another: which method forgets least at equal cost.
#
#     benchmarks/continual/run.sh DATA OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. README.md beside it is the protocol. All
# methods of one seed run before those of the next. The same command goes on where it was stopped, and collects what is
# finished into OUT/continual.json. In the environment: METHODS, a pattern (`lwf`, `inter*`); SEEDS, how many (3);
# ORDERS (`forward reverse`); EPOCHS of a first stage (40); LATER, epochs of SAT in each later one (12). KEY=VALUE goes
# to all recipes.
set -euo pipefail
data=$(realpath "$1") out=$2
extra=("${@:3}")
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=3}" "${ORDERS:=forward reverse}" "${EPOCHS:=40}" "${LATER:=12}"
linf=Linf:8/255 l2=L2:0.5 l1=L1:12
known=

# run NAME RECIPE [KEY=VALUE...]: one run, in OUT/NAME/seed=SEED.
run() {
  local name=$1 recipe=$2
  shift 2
  [[ ${name##*/} == $METHODS || ${name##*/} == first ]] || return 0
  known=1
  [[ -f $out/$name/seed=$seed/report.html ]] && return 0
  echo "$name, seed $seed"
  dualhead train "$recipe" "data.source=$data" "runtime.seed=$seed" "$@" "${extra[@]}" \
    --run-dir "$out/$name/seed=$seed" --quiet > /dev/null
  python "$here/collect.py" "$out" "$out/continual.json"
}

# method NAME COST SECOND THIRD [KEY=VALUE...]: later stages with these objectives, at the cost of SAT, which is 13.
method() {
  local name=$1 epochs=$(((LATER * 13 + $2 / 2) / $2)) second=$3 third=$4
  shift 4
  run "$order/$name" "$here/sequence.yaml" "stages.first.init=$out/$order/first/seed=$seed" \
    "stages.first.threat=${threats[0]}" "stages.second.threat=${threats[1]}" "stages.third.threat=${threats[2]}" \
    "stages.second.epochs=$epochs" "stages.third.epochs=$epochs" \
    "stages.second.objective=$second" "stages.third.objective=$third" "$@"
}

# interpolated NAME SEEN2 SEEN3: fine-tuning, and after each stage weights between before and after.
interpolated() {
  local shared="train: [model], keep: last, attack: {name: pgd, steps: 5, start: uniform}, batch_size: 64"
  local tuned="$shared, objective: sat, epochs: $LATER, optimiser: {name: sgd, lr: 0.05, weight_decay: 5.0e-4}, schedule: cosine"
  local stages="[{name: first, $shared, objective: sat, epochs: 0, threat: \"${threats[0]}\", init: \"$out/$order/first/seed=$seed\"}"
  stages+=", {name: tuned2, $tuned, threat: \"${threats[1]}\"}"
  stages+=", {name: second, train: [model], keep: last, threat: \"${threats[1]}\", interpolate: {between: [first, tuned2], threats: [$2]}}"
  stages+=", {name: tuned3, $tuned, threat: \"${threats[2]}\"}"
  stages+=", {name: third, train: [model], keep: last, threat: \"${threats[2]}\", interpolate: {between: [second, tuned3], threats: [$3]}}]"
  run "$order/$1" "$here/sequence.yaml" "stages=$stages"
}

sat() { # NAME THREAT EPOCHS
  run "$1" "$here/base.yaml" "stages.base.threat=$2" "stages.base.epochs=$3"
}

for ((seed = 0; seed < SEEDS; seed++)); do
  for order in $ORDERS; do
    threats=("$linf" "$l2" "$l1")
    [[ $order == reverse ]] && threats=("$l1" "$l2" "$linf")
    a="'${threats[0]}'" b="'${threats[1]}'" c="'${threats[2]}'"
    sat "$order/first" "${threats[0]}" "$EPOCHS"
    method finetune 13 sat sat
    method seen 13 "{name: any_of, choose: adaptive, among: [$a, $b]}" "{name: any_of, choose: adaptive, among: [$a, $b, $c]}"
    method lwf 18 lwf lwf
    method alr 22 alr alr
    method ramp 26 "{name: ramp, weight: 1.5, among: [$a, $b]}" "{name: ramp, weight: 1.5, among: [$a, $c]}"
    interpolated interpolate-lost "$b" "$c"
    method replay 26 "{name: replay, among: [$a]}" "{name: replay, among: [$a, $b]}"
    method ewc 13 "{name: ewc, old: $a}" "{name: ewc, old: $b}"
    method air 21 air air
    method derpp 30 "{name: replay, weight: 0.5, logits: 0.2, among: [$a]}" "{name: replay, weight: 0.5, logits: 0.2, among: [$a, $b]}"
    method agem 26 "{name: agem, among: [$a]}" "{name: agem, among: [$a, $b]}"
    interpolated interpolate-kept "$a, $b" "$a, $b, $c"
  done
  run bounds/joint "$here/base.yaml" "stages.base.epochs=$((EPOCHS + 2 * LATER))" \
    "stages.base.objective={name: any_of, choose: adaptive, among: [$linf, $l2, $l1]}"
  sat bounds/specialist-linf $linf $((EPOCHS + 2 * LATER))
  sat bounds/specialist-l2 $l2 $((EPOCHS + 2 * LATER))
  sat bounds/specialist-l1 $l1 $((EPOCHS + 2 * LATER))
done

[[ -n $known ]] || { echo "METHODS=$METHODS: no method is called so" >&2; exit 2; }
