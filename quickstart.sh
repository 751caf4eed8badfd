#!/usr/bin/env bash
# LAPO from videos to a playing policy in about 9 minutes on two CPU cores: stages 1 to 4, with every flag that
# makes them small. The scripts' defaults are the paper's settings; docs/quickstart.md says why each flag is
# here. Interrupted (Ctrl-C), the same command goes on.
#     ./quickstart.sh [ENV_ID]            any game with a demonstrator in experts/
#     ./quickstart.sh FrozenLake-v1       a small world in a few minutes (docs/small-worlds.md)
#     SEED=2 ./quickstart.sh [ENV_ID]     another seed
set -euo pipefail
cd "$(dirname "$0")"
ENV_ID=${1:-coinrun}
SEED=${SEED:-1}
PYTHON=${PYTHON:-python}
OUT=runs/quickstart/${ENV_ID}__$SEED # the dataset, the stages' run folders, report.png and results.json
COMMON=(--env-id "$ENV_ID" --seed "$SEED" --runs-dir "$OUT" --data-dir "$OUT/data")

if [ ! -f "experts/$ENV_ID.pt" ] && [ "$ENV_ID" != FrozenLake-v1 ]; then
    have=$(cd experts && ls -- *.pt | sed 's/\.pt$//' | paste -sd' ')
    echo "error: no demonstrator experts/$ENV_ID.pt (there is: $have): train one with" \
        "\`python ppo_procgen.py --env-id $ENV_ID\` and copy its checkpoint.pt to experts/$ENV_ID.pt" >&2
    exit 1
fi
if [ -f "$OUT/results.json" ]; then # all of it is done: this is a new go
    echo "== $OUT is finished: removing it, to make it anew"
    rm -rf "$OUT"/*/ "$OUT" # in this order: interrupted in between, it still counts as finished
fi

# Ctrl-C reaches the stage as well; then no other stage starts.
stopped=0
trap 'stopped=130' INT
trap 'stopped=143' TERM

run() { # NAME arguments of python...
    local name=$1 status=0
    shift
    echo "== $PYTHON $*"
    "$PYTHON" "$@" || status=$?
    if [ $status -eq 0 ]; then status=$stopped; fi # a signal to bash alone
    if [ $status -gt 128 ]; then echo "== stopped in $name: the same command goes on from here" >&2; fi
    if [ $status -ne 0 ]; then exit $status; fi
}

stage() { # script flags...: runs it, unless it is finished; one that was interrupted goes on by itself
    if [ -f "$OUT/${ENV_ID}__${1%.py}__$SEED/results.json" ]; then
        echo "== $1 is finished"
        return
    fi
    run "$1" "$@"
}

if [ "$ENV_ID" = FrozenLake-v1 ]; then
    stage collect_expert_data.py "${COMMON[@]}" --demonstrator value_iteration --num-levels 16 \
        --num-train-frames 4096 --num-test-frames 512 --num-envs 32
    stage lapo_pretrain.py "${COMMON[@]}" \
        --num-updates 600 --batch-size 32 --learning-rate 1e-3 --warmup-updates 100 \
        --no-vq --vq-num-codebooks 1 --vq-num-slots 1 --vq-dim 4 \
        --patch-size 2 --idm-scale 0.5 --fdm-width 8 --predict-change --no-bf16 --eval-every 100 --eval-windows 1024
    stage lapo_bc.py "${COMMON[@]}" \
        --num-updates 1200 --batch-size 64 --learning-rate 1e-3 --warmup-updates 50 --eval-every 250 \
        --policy-scale 0.5
    stage lapo_decode.py "${COMMON[@]}" --num-labels 16 --eval-episodes 50 --temperature 0.5 \
        --decoder-updates 200 --cloning-updates 200 --policy-batch-size 64
    run tools.first_report -m tools.first_report "${COMMON[@]}"
    exit
fi
stage collect_expert_data.py "${COMMON[@]}" --expert-checkpoint "experts/$ENV_ID.pt" \
    --num-train-frames 65536 --num-test-frames 8192
stage lapo_pretrain.py "${COMMON[@]}" \
    --num-updates 2000 --batch-size 32 --learning-rate 1e-3 --warmup-updates 500 \
    --patch-size 2 --idm-scale 1 --fdm-width 16 --vq-dim 4 --predict-change --eval-every 500 --eval-windows 2048
stage lapo_bc.py "${COMMON[@]}" \
    --num-updates 1500 --batch-size 64 --learning-rate 1e-3 --warmup-updates 50 --policy-scale 1 --eval-every 250
stage lapo_decode.py "${COMMON[@]}" \
    --num-labels 32 128 512 2048 --num-draws 3 --eval-episodes 120 --temperature 0.5 --decoder-updates 200 \
    --cloning-updates 200 --cloning-epochs 12 --cloning-learning-rate 3e-3 --policy-batch-size 64
run tools.quickstart_report -m tools.quickstart_report "${COMMON[@]}"
