#!/usr/bin/env bash
# DAT against the same adversarial training continued for as many passes; two heads against one.
#
#     benchmarks/generation/run.sh OUT
#
# From the root of the repository, with `dualhead` and its `python` on the path. README.md beside it is the protocol.
# The same command goes on where it was stopped, and collects what is finished into KEPT (OUT/generation.json). In the
# environment: METHODS, a pattern of variants (`dat`); SEEDS (0 1 2 3 4; two heads and CIFAR-10 take the first three);
# ONLY=train or ONLY=measure for one half; KEPT, an answer whose other seeds stay in it. CIFAR10 and STARTS, folders of
# CIFAR-10 and of what `seeds.py` made, for the variants of CIFAR-10; FASHION, a folder of Fashion-MNIST, for that of
# it: without them these are left out.
set -euo pipefail
out=$1
here=$(dirname "$0")
: "${METHODS:=*}" "${SEEDS:=0 1 2 3 4}" "${ONLY:=}" "${KEPT:=$out/generation.json}"
: "${CIFAR10:=}" "${STARTS:=}" "${FASHION:=}"
judge=$here/../results/models/digits-judge # of all that learnt the digits
known=

# measured RUN NAME [OPTION...]: an evaluation of a run, once.
measured() {
  local folder=$1/evaluations/$2
  [[ $ONLY == train || ! -f $1/report.html || -f $folder/done ]] && return
  dualhead evaluate "$1" --output "$folder" --quiet "${@:3}"
  touch "$folder/done"
}

# study NAME RECIPE SEEDS: a recipe with each seed.
study() {
  [[ $1 == $METHODS ]] || return 0
  known=1
  for seed in $3; do
    run=$out/$1/seed=$seed
    if [[ $ONLY != measure && ! -f $run/report.html ]]; then
      dualhead train "$2" "runtime.seed=$seed" runtime.lanes=1 --run-dir "$run" --quiet
    fi
    case $1 in
      two-heads)
        for output in head1 head2 mean; do
          measured "$run" "$output" --attack pgd-20 --generation --judge "$judge" --output-of "$output"
        done
        ;;
      *)
        measured "$run" samples --attack pgd-20 --generation --judge "$judge" --ood uniform --ood gaussian
        ;;
    esac
    [[ $1 != dat ]] || measured "$run" base --attack pgd-20 --generation --judge "$judge" --stage base
  done
}

# larger NAME RECIPE SEEDS LIMIT OOD [KEY=VALUE...]: the same of a data set whose judge the evaluation makes.
larger() {
  [[ $1 == $METHODS ]] || return 0
  known=1
  for seed in $3; do
    run=$out/$1/seed=$seed
    if [[ $ONLY != measure && ! -f $run/report.html ]]; then
      more=()
      if [[ $1 == *-continued ]]; then # as many passes as the energy took
        more=("stages.joint.epochs=$(python "$here/collect.py" epochs "$out/${1%-continued}-dat/seed=$seed")")
      fi
      dualhead train "$2" "runtime.seed=$seed" runtime.lanes=1 "${@:6}" "${more[@]}" --run-dir "$run" --quiet
    fi
    measured "$run" samples --attack pgd-20 --generation --limit "$4" --ood "$5"
    measured "$run" strong --attack autoattack --limit 500
  done
}

# attacked NAME SEEDS: AutoAttack on runs of a study.
attacked() {
  [[ $1 == $METHODS ]] || return 0
  for seed in $2; do
    measured "$out/$1/seed=$seed" strong --attack autoattack
  done
}

few=$(echo $SEEDS | cut -d' ' -f1-3)
study dat digits_dat "$SEEDS"
study continued "$here/continued.yaml" "$SEEDS"
study two-heads digits_dat_two_heads "$few"
study mean digits_dat_mean "$few"
attacked dat "$SEEDS"
attacked continued "$SEEDS"
if [[ $CIFAR10 && $STARTS ]]; then
  natural="stages.joint.objective.seeds.source=$STARTS"
  larger cifar10-dat "$here/cifar10.yaml" "$few" 2000 "$STARTS" "data.source=$CIFAR10" "$natural"
  larger cifar10-continued "$here/cifar10_continued.yaml" "$few" 2000 "$STARTS" "data.source=$CIFAR10"
fi
if [[ $FASHION ]]; then
  larger fashion-dat fashion_dat "${SEEDS%% *}" 2000 uniform "data.source=$FASHION"
fi
[[ -n $known ]] || { echo "METHODS=$METHODS: no variant is called so, or its folder is not given" >&2; exit 2; }
python "$here/collect.py" "$out" "$KEPT"
