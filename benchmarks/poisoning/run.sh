#!/usr/bin/env bash
# Poisoned training data: what each method makes of them.
#
#     benchmarks/poisoning/run.sh DATA OUT digits|pilot|study|small [KEY=VALUE...]
#
# From the root of the repository, with `dualhead` and its `python` on the path. README.md beside it is the protocol.
# One run at a time; cells that decide come first, the cheap ones of them before the others. The same command goes on
# where it was stopped, and collects all that is finished into KEPT.json, its answers into OUT/answers. In the
# environment: METHODS, a pattern of cells (`natural-*`); SEEDS of each cell (0 1 2, in `study` and `small` 0 1 2 3 4),
# FEW_SEEDS of controls (0 1 2), MORE_SEEDS, further ones of success rates (none); IMAGES, test images of each attack in
# the study (1000). PRECISION=float32 on a CPU without bf16. KEPT, a folder for what finished runs found, one small file
# each (../results/poisoning): a seed that has its file there is not trained again. KEY=VALUE goes to all recipes.
# `digits` and `small` take DATA=digits, and minutes.
set -euo pipefail
data=$1 out=$2 part=$3
extra=("${@:4}")
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=}" "${FEW_SEEDS:=0 1 2}" "${MORE_SEEDS:=}" "${PRECISION:=bf16}" "${IMAGES:=1000}"
: "${KEPT:=$here/../results/poisoning}"
known=
mkdir -p "$out"

# Radii that belong to the data: of the threat, of a weak surrogate, of a step of the hypocritical poison, of class noise.
# Of the study, the attacks that reach their marks there (README.md).
case $part in
  digits | small) eps=0.15 weak=0.0375 step=0.015 long=1.0 backdoors='patch blend' others='class_noise label_flip' ;;
  *) eps=8/255 weak=2/255 step=0.8/255 long=0.5 backdoors='blend sinusoid' others='class_blocks label_flip' ;;
esac

to= # in the study the target goes through the classes, seed by seed
[[ $part != study && $part != small ]] || to=', target: TARGET'

hypocritical="{name: towards, shift: 0, eps: $eps, step_size: $step, seed: SEED, surrogate:"
by_sat="$hypocritical {objective: sat, eps: $weak, epochs: 10, seed: 100SEED}}"
noise="{name: class_noise, eps: $long, seed: SEED}"
patch="{name: patch, share: 0.05, seed: SEED$to}"
blend="{name: blend, share: 0.05, seed: SEED$to}"
wave="{name: sinusoid, share: 0.5, seed: SEED$to}"
blocks='{name: class_noise, shape: blocks, seed: SEED}'
declare -A poisons=(
  [clean]=null
  [patch]=$patch
  [sticker]='{name: patch, clean_label: true, target: 7, seed: SEED}'
  [blend]=$blend
  [sinusoid]=$wave
  [class_noise]=$noise
  [class_noise_large]='{name: class_noise, eps: 1.0, seed: SEED}'
  [class_blocks]=$blocks
  [one_pixel]='{name: one_pixel, seed: SEED}'
  [label_flip]='{name: label_flip, share: 0.2, seed: SEED}'
  [hypocritical]=$by_sat
  [hypocritical_self]="$hypocritical {objective: self, eps: $weak, seed: 100SEED}}"
  [sham_noise]="{name: sham, like: $noise}"
  [sham_patch]="{name: sham, seed: SEED, like: $patch}"
  [sham_blend]="{name: sham, seed: SEED, like: $blend}"
  [sham_sinusoid]="{name: sham, seed: SEED, like: $wave}"
  [sham_class_blocks]="{name: sham, seed: SEED, like: $blocks}"
  [sham_class_noise]="{name: sham, seed: SEED, like: $noise}"
  [sham_hypocritical]="{name: sham, seed: SEED, like: $by_sat}"
)
[[ $part != digits ]] || poisons[class_noise]='{name: class_noise, seed: SEED}'

# poison NAME SEED: as a recipe writes it.
poison() {
  local text=${poisons[$1]//TARGET/$(($2 % 10))}
  echo "${text//SEED/$2}"
}

# cell METHOD POISON SEED RECIPE [KEY=VALUE...]: one run, and the small file that stays of it.
cell() {
  local method=$1 name=$2 seed=$3 recipe=$4 found=$KEPT/$part/$1-$2/seed=$3.json run=$out/$part/$1-$2/seed=$3
  [[ $method-$name == $METHODS ]] || return 0
  known=1
  shift 4
  [[ ! -f $found ]] || return 0
  echo "$method-$name seed $seed"
  if [[ ${poisons[$name]} == *surrogate* ]]; then # one surrogate, and one search, for all methods on a seed
    mkdir -p "$run" "$out/$part/surrogates"
    [[ -e $run/poison ]] || ln -s "$(realpath "$out/$part/surrogates")" "$run/poison"
  fi
  dualhead train "$recipe" --run-dir "$run" "data.source=$data" "runtime.seed=$seed" \
    "data.poison=$(poison "$name" "$seed")" "$@" "${extra[@]}" --quiet
  [[ $part == digits || ($part == pilot && $method != base) ]] || measured_further "$method" "$name" "$seed" "$run"
  python "$here/collect.py" keep "$run" "$found"
  python "$here/collect.py" tell "$KEPT" "$KEPT.json" > "$out/answers"
}

# measured_further METHOD POISON SEED RUN: success rates of a model that learnt from clean data, and robust accuracy
# under the attack of the study where that is what a poison is to change.
measured_further() {
  local trigger
  if [[ $2 == clean ]]; then
    for trigger in $backdoors; do
      dualhead evaluate "$4" --data "$data" --poison "$(poison "$trigger" "$3")" --attack fgsm --limit "$IMAGES" \
        --output "$4/evaluations/trigger_$trigger" --quiet
    done
  fi
  if [[ $1 != natural && ($2 == clean || $2 == *hypocritical*) ]]; then
    dualhead evaluate "$4" --data "$data" --attack autoattack-fast --limit "$IMAGES" --output "$4/evaluations/strong" \
      --quiet
  fi
}

# studied METHOD POISON SEED: a cell of the study, or of the same on digits.
studied() {
  local recipe words=("name=poisoning" "runtime.precision=$PRECISION")
  words+=("validation={attack: {name: pgd, steps: 10}, every: 20}")
  words+=("evaluate={attacks: [pgd-20], limit: $IMAGES, gallery: 0}")
  if [[ $part == small ]]; then
    words=("name=poisoning" "evaluate={attacks: [pgd-20], limit: 400, gallery: 0}")
    words+=("validation={attack: {name: pgd, steps: 10}, every: 10}")
  fi
  case $part-$1 in
    study-natural) recipe=$here/base.yaml words+=("${natural[@]}" stages.base.epochs=60) ;;
    study-base) recipe=$here/base.yaml words+=(stages.base.epochs=40) ;;
    study-base_long) recipe=$here/base.yaml words+=(stages.base.epochs=80) ;;
    study-base_short) recipe=$here/base.yaml words+=(stages.base.epochs=22) ;;
    study-base_larger_eps)
      recipe=$here/base.yaml words+=(stages.base.epochs=40 'stages.base.threat={norm: Linf, eps: 12/255}') ;;
    study-dhat) recipe=$here/../strongest/cpu_dhat.yaml words+=("${three[@]}" stages.aggregator.epochs=4) ;;
    study-dhat_fitted) recipe=$here/dhat_fitted.yaml words+=("${three[@]}") ;;
    study-distilled)
      recipe=$here/../strongest/cpu_distilled.yaml words+=(stages.guided.epochs=34 stages.distilled.epochs=38) ;;
    study-ensemble) recipe=$here/../strongest/cpu_ensemble.yaml words+=(stages.first.epochs=40 stages.second.epochs=40) ;;
    small-natural) recipe=digits_natural ;;
    small-base) recipe=digits_base ;;
    small-base_long) recipe=digits_base words+=(stages.base.epochs=120) ;;
    small-base_short) recipe=digits_base words+=(stages.base.epochs=22) ;;
    small-dhat) recipe=$here/small_dhat.yaml ;;
    small-distilled)
      recipe=digits_guided_distillation words+=(stages.guided.epochs=54 stages.distilled.epochs=58) ;;
    *) return 0 ;;
  esac
  [[ $1 != dhat_fitted || $2 == clean ]] || words+=(data.clean_validation=true)
  case $part-$1 in # steps follow eps, here and in the surrogate, which all methods share
    study-dhat_fitted) words+=(stages.main_head.attack.step_size=null stages.second_head.attack.step_size=null) ;;
    study-*) words+=("stages.*.attack.step_size=null") ;;
  esac
  cell "$1" "$2" "$3" "$recipe" "${words[@]}"
}

# pairs SEEDS POISONS METHODS: for each poison and seed, every method on clean and on poisoned data.
pairs() {
  local poison seed method
  for poison in $2; do
    for seed in $1; do
      for method in $3; do
        studied "$method" clean "$seed"
        studied "$method" "$poison" "$seed"
      done
    done
  done
}

natural=(stages.base.objective=natural)
three=(stages.main_head.epochs=22 stages.second_head.epochs=15)
pilot=("runtime.precision=$PRECISION")
sat=(stages.base.objective=sat stages.base.attack.start=uniform)

case $part in
  digits)
    small=("evaluate={attacks: [pgd-10], limit: 400, gallery: 0}")
    for seed in ${SEEDS:-0 1 2}; do
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
    for poison in clean class_noise class_blocks one_pixel; do
      cell sat "$poison" 100 "$here/base.yaml" "${pilot[@]}" "${sat[@]}" stages.base.epochs=40
    done
    for poison in sticker blend sinusoid class_blocks label_flip sham_noise; do
      cell natural "$poison" 100 "$here/base.yaml" "${pilot[@]}" "${natural[@]}" stages.base.epochs=60
    done
    for poison in clean hypocritical; do # is the surrogate strong enough?
      cell base "$poison" 100 "$here/base.yaml" "${pilot[@]}" stages.base.epochs=40 "evaluate.limit=$IMAGES"
    done
    for poison in patch sticker; do
      cell sat "$poison" 100 "$here/base.yaml" "${pilot[@]}" "${sat[@]}" stages.base.epochs=40
    done
    ;;
  study | small)
    seeds=${SEEDS:-0 1 2 3 4}
    free="$backdoors $others"
    # Does an attack work at all? Natural training costs a fourteenth of the others.
    pairs "$seeds" "$free" natural
    # DH-AT against the base method at its cost, attack by attack; the adaptive poison, which costs twice, comes last.
    pairs "$seeds" "$free hypocritical hypocritical_self" 'base dhat'
    # Success rates vary the most from seed to seed.
    pairs "$MORE_SEEDS" "$backdoors" 'base dhat'
    # What costs twice as much: guided distillation, an ensemble of two, the base method for as long.
    pairs "$seeds" "$free hypocritical hypocritical_self" 'base_long distilled ensemble'
    # Controls: the base method for as long as the first stage of DH-AT, when triggers may not have been learnt yet; a
    # larger eps; an aggregator fitted on clean held-out images; a placebo.
    pairs "$seeds" "$backdoors" base_short
    pairs "$FEW_SEEDS" "$free hypocritical" 'base_larger_eps dhat_fitted'
    shams=
    for poison in $free hypocritical; do
      [[ $poison == label_flip ]] || shams+=" sham_$poison" # it changes no pixel, so that nothing is left of its sham
    done
    pairs "$FEW_SEEDS" "$shams" 'base dhat'
    ;;
  *) echo "$part: use digits, pilot, study or small" >&2; exit 2 ;;
esac
[[ -n $known ]] || { echo "METHODS=$METHODS: no cell is called so" >&2; exit 2; }
