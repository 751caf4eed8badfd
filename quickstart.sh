#!/usr/bin/env bash
# LAPO from videos to a playing policy in a quarter of an hour on two CPU cores: the five stages' first four, with every flag that makes
# them small. The scripts' defaults are the paper's settings; README.md, "What the quickstart changes", says why each flag is here.
#     ./quickstart.sh [ENV_ID]        any game with a demonstrator in experts/
set -euo pipefail
cd "$(dirname "$0")"
ENV_ID=${1:-coinrun}
PYTHON=${PYTHON:-python}
OUT=runs/quickstart
COMMON=(--env-id "$ENV_ID" --seed 1 --runs-dir "$OUT")

if [ ! -f "experts/$ENV_ID.pt" ]; then
    have=$(cd experts && ls -- *.pt | sed 's/\.pt$//' | paste -sd' ')
    echo "error: no demonstrator experts/$ENV_ID.pt (there is: $have): train one with" \
        "\`python collect_expert_data.py --env-id $ENV_ID --num-train-frames 0\` and copy its checkpoint.pt to experts/$ENV_ID.pt" >&2
    exit 1
fi

stages=() # script seconds script seconds ...
stage() { # script flags...: runs it and notes how long it took
    local start=$SECONDS
    # a finished stage is done again, one that was interrupted goes on
    local again=()
    if [ -f "$OUT/${ENV_ID}__${1%.py}__1/results.json" ]; then again=(--overwrite); fi
    echo "== $PYTHON $*" "${again[@]}"
    "$PYTHON" "$@" "${again[@]}"
    stages+=("$1" $((SECONDS - start)))
}

stage collect_expert_data.py "${COMMON[@]}" --data-dir "$OUT/data/$ENV_ID" --expert-checkpoint "experts/$ENV_ID.pt" \
    --num-train-frames 65536 --num-test-frames 8192
stage lapo_pretrain.py "${COMMON[@]}" --data-dir "$OUT/data/$ENV_ID" \
    --num-updates 2000 --batch-size 32 --learning-rate 1e-3 --warmup-updates 500 --idm-scale 1 --fdm-width 8 --vq-dim 4 --predict-change \
    --eval-every 250 --eval-windows 2048
stage lapo_bc.py "${COMMON[@]}" --data-dir "$OUT/data/$ENV_ID" \
    --num-updates 8000 --batch-size 64 --learning-rate 1e-3 --warmup-updates 50 --policy-scale 0.5 --eval-every 1000
stage lapo_decode.py "${COMMON[@]}" --data-dir "$OUT/data/$ENV_ID" \
    --num-labels 32 128 512 2048 --table-labels 512 --num-draws 5 --eval-episodes 200 --temperature 0.5 \
    --decoder-updates 200 --bc-updates 200 --bc-batch-size 64 --capture-video
"$PYTHON" report.py --env-id "$ENV_ID" --seed 1 --runs-dir "$OUT" --stage-seconds "${stages[@]}"
