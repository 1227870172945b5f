#!/usr/bin/env bash
# Threats one after another: which method forgets least at equal cost.
#
#     benchmarks/continual/run.sh DATA OUT [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. README.md beside it is the protocol.
# All methods of one seed run before those of the next. The same command goes on where it was stopped, and tells what is
# finished in OUT/continual.json. In the environment: METHODS, a pattern (`lwf`, `inter*`); SEEDS (0 1 2); ORDERS
# (`forward reverse`); EPOCHS of a first stage (40); LATER, epochs of SAT in each later one (12); IMAGES, test images
# (1000), of which half meet the attacks on routers; KEPT, a folder for what each finished seed reached and cost, one
# small file each (../results/continual): a seed that has its file there is not trained again; CLEAN, the clean network
# that images are made against once (../results/models/continual-clean). KEY=VALUE goes to all recipes. Several
# processes, of other METHODS or ORDERS, can share OUT.
set -euo pipefail
data=$(realpath "$1") out=$2
extra=("${@:3}")
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=0 1 2}" "${ORDERS:=forward reverse}" "${EPOCHS:=40}" "${LATER:=12}" "${IMAGES:=1000}"
: "${KEPT:=$here/../results/continual}" "${CLEAN:=$here/../results/models/continual-clean}"
linf=Linf:8/255 l2=L2:0.5 l1=L1:12
known=
mkdir -p "$out"

# trained NAME RECIPE [KEY=VALUE...]: one run, in OUT/NAME/seed=SEED; a second process waits for the first.
trained() {
  local run=$out/$1/seed=$seed recipe=$2
  shift 2
  mkdir -p "${run%/*}"
  {
    flock 9
    [[ ! -f $run/report.html ]] || return 0
    echo "${run#"$out"/}"
    dualhead train "$recipe" "data.source=$data" "runtime.seed=$seed" "evaluate.limit=$IMAGES" \
      "$@" "${extra[@]}" --run-dir "$run" --quiet > /dev/null
  } 9> "$run.lock"
}

# wanted NAME: whether a method is asked for and has not been kept.
wanted() {
  [[ ${1##*/} == $METHODS ]] || return 1
  known=1
  [[ ! -f $KEPT/$1/seed=$seed.json ]]
}

# keep NAME [FIRST]: its small file, and all files told together. Images are made against the clean network once.
keep() {
  {
    flock 9
    if [[ ! -f $out/static/results.json ]]; then
      dualhead evaluate "$CLEAN" --data "$data" --threat "$linf" --threat "$l2" --threat "$l1" --attack pgd-40 \
        --limit "$IMAGES" --precision float32 --save-adversarial --output "$out/static" --quiet > /dev/null
    fi
  } 9> "$out/static.lock"
  python "$here/collect.py" keep "$out/$1/seed=$seed" "$KEPT/$1/seed=$seed.json" "$out/static" ${2:+"$2"}
  python "$here/collect.py" tell "$KEPT" "$out/continual.json"
}

# later NAME [KEY=VALUE...]: a sequence that goes on from the first stage, which is trained when it is needed.
later() {
  local name=$order/$1
  shift
  wanted "$name" || return 0
  trained "$order/first" "$here/base.yaml" "stages.base.threat=${threats[0]}" "stages.base.epochs=$EPOCHS"
  trained "$name" "$here/sequence.yaml" "$@"
  keep "$name" "$out/$order/first/seed=$seed"
}

# method NAME COST SECOND THIRD [KEY=VALUE...]: later stages with these objectives, at the cost of SAT, which is 13.
method() {
  local name=$1 epochs=$(((LATER * 13 + $2 / 2) / $2)) second=$3 third=$4
  shift 4
  later "$name" "stages.first.init=$out/$order/first/seed=$seed" \
    "stages.first.threat=${threats[0]}" "stages.second.threat=${threats[1]}" "stages.third.threat=${threats[2]}" \
    "stages.second.epochs=$epochs" "stages.third.epochs=$epochs" \
    "stages.second.objective=$second" "stages.third.objective=$third" "$@"
}

# interpolated NAME SHARES EPOCHS2 EPOCHS3 SEEN2 SEEN3: fine-tuning, and after each stage weights between before and
# after, of these shares the one that is best on held-out images under the threats that were seen.
interpolated() {
  local shared="train: [model], keep: last, attack: {name: pgd, steps: 5, start: uniform}, batch_size: 64"
  local tuned="$shared, objective: sat, optimiser: {name: sgd, lr: 0.05, weight_decay: 5.0e-4}, schedule: cosine"
  local stages="[{name: first, $shared, objective: sat, epochs: 0, threat: \"${threats[0]}\", init: \"$out/$order/first/seed=$seed\"}"
  stages+=", {name: tuned2, $tuned, epochs: $3, threat: \"${threats[1]}\"}"
  stages+=", {name: second, train: [model], keep: last, threat: \"${threats[1]}\", interpolate: {between: [first, tuned2], shares: [$2], threats: [$5]}}"
  stages+=", {name: tuned3, $tuned, epochs: $4, threat: \"${threats[2]}\"}"
  stages+=", {name: third, train: [model], keep: last, threat: \"${threats[2]}\", interpolate: {between: [second, tuned3], shares: [$2], threats: [$6]}}]"
  later "$1" "stages=$stages" 'validation.attack={name: pgd, steps: 5}'
}

# routed NAME COST2 COST3 SECOND THIRD: after DDeR; it has a first stage of its own, since a router trains with it.
routed() {
  local name=$order/$1 first=$(((EPOCHS * 13 + 9) / 18))
  wanted "$name" || return 0
  trained "$name" "$here/routed.yaml" "stages.first.threat=${threats[0]}" "stages.first.epochs=$first" \
    "stages.second.threat=${threats[1]}" "stages.second.epochs=$(((LATER * 13 + $2 / 2) / $2))" \
    "stages.third.threat=${threats[2]}" "stages.third.epochs=$(((LATER * 13 + $3 / 2) / $3))" \
    "stages.second.objective=$4" "stages.third.objective=$5"
  dualhead evaluate "$out/$name/seed=$seed" --data "$data" --routers --attack apgd-ce,multihead-5,steered-5 \
    --limit "$((IMAGES / 2))" --output "$out/$name/seed=$seed/evaluations/routers" --quiet
  keep "$name"
}

# bound NAME [KEY=VALUE...]: a network that knows its threats from the start.
bound() {
  local name=bounds/$1
  shift
  wanted "$name" || return 0
  trained "$name" "$here/base.yaml" "stages.base.epochs=$((EPOCHS + 2 * LATER))" "$@"
  keep "$name"
}

for seed in $SEEDS; do
  for order in $ORDERS; do
    threats=("$linf" "$l2" "$l1")
    [[ $order == reverse ]] && threats=("$l1" "$l2" "$linf")
    a="'${threats[0]}'" b="'${threats[1]}'" c="'${threats[2]}'"
    method finetune 13 sat sat
    any="name: any_of, choose: adaptive, seed: $seed" few="name: replay, seed: $seed"
    method seen 13 "{$any, among: [$a, $b]}" "{$any, among: [$a, $b, $c]}"
    method lwf 18 lwf lwf
    method alr 22 alr alr
    method ramp 26 "{name: ramp, weight: 1.5, among: [$a, $b]}" "{name: ramp, weight: 1.5, among: [$a, $c]}"
    interpolated interpolate-lost 0.5 "$LATER" "$LATER" "$b" "$c"
    method replay 26 "{$few, among: [$a]}" "{$few, among: [$a, $b]}"
    method ewc 13 "{name: ewc, old: $a}" "{name: ewc, old: $b}" \
      stages.second.batch_norm=frozen stages.third.batch_norm=frozen
    method air 21 air air
    method derpp 30 "{$few, weight: 0.5, logits: 0.2, among: [$a]}" "{$few, weight: 0.5, logits: 0.2, among: [$a, $b]}"
    method agem 26 "{name: agem, seed: $seed, among: [$a]}" "{name: agem, seed: $seed, among: [$a, $b]}"
    routed routed-lost 22 29 "{name: after_dder, router: 2}" "{name: after_dder, router: 3}"
    routed routed-kept 33 56 "{name: after_dder, router: 2, old: [$a]}" "{name: after_dder, router: 3, old: [$a, $b]}"
    interpolated interpolate-kept '0, 0.25, 0.5, 0.75, 1' "$((LATER - 2))" "$((LATER - 4))" "$a, $b" "$a, $b, $c"
  done
  bound joint "stages.base.objective={name: any_of, choose: adaptive, seed: $seed, among: [$linf, $l2, $l1]}"
  bound specialist-linf "stages.base.threat=$linf"
  bound specialist-l2 "stages.base.threat=$l2"
  bound specialist-l1 "stages.base.threat=$l1"
done

[[ -n $known ]] || { echo "METHODS=$METHODS: no method is called so" >&2; exit 2; }
