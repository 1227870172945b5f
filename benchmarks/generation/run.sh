#!/usr/bin/env bash
# DAT on the digits against the same adversarial training continued for as many passes; two heads against one.
#
#     benchmarks/generation/run.sh OUT
#
# From the root of the repository, with `dualhead` and its `python` on the path. README.md beside it is the protocol.
# The same command goes on where it was stopped, and collects what is finished into OUT/generation.json.
# In the environment: STUDIES, a pattern of variants (`dat`); SEEDS, which (0 1 2 3 4; two heads take the first three);
# ONLY=train or ONLY=measure for one half.
set -euo pipefail
out=$1
here=$(dirname "$0")
: "${STUDIES:=*}" "${SEEDS:=0 1 2 3 4}" "${ONLY:=}"

# measured RUN NAME [OPTION...]: an evaluation of a run, once.
measured() {
  local folder=$1/evaluations/$2
  [[ $ONLY == train || ! -f $1/report.html || -f $folder/done ]] && return
  dualhead evaluate "$1" --output "$folder" --quiet "${@:3}"
  touch "$folder/done"
}

# study NAME RECIPE SEEDS: a recipe with each seed.
study() {
  [[ $1 == $STUDIES ]] || return 0
  for seed in $3; do
    run=$out/$1/seed=$seed
    if [[ $ONLY != measure && ! -f $run/report.html ]]; then
      dualhead train "$2" "runtime.seed=$seed" runtime.lanes=1 --run-dir "$run" --quiet
    fi
    case $1 in
      two-heads)
        for output in head1 head2 mean; do
          measured "$run" "$output" --attack pgd-20 --generation --output-of "$output"
        done
        ;;
      *) measured "$run" samples --attack pgd-20 --generation --ood uniform --ood gaussian ;;
    esac
    [[ $1 != dat ]] || measured "$run" base --attack pgd-20 --generation --stage base
  done
}

# attacked NAME SEEDS: AutoAttack on runs of a study.
attacked() {
  [[ $1 == $STUDIES ]] || return 0
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
python "$here/collect.py" "$out"
