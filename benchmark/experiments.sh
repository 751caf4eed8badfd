#!/usr/bin/env bash
# The paper's two experiments, ours, and what its readers ask, one command each:
#
#     benchmark/experiments.sh SCALE EXPERIMENT ENV_ID SEED...
#
#     SCALE        small (about 1.5 hours of a CPU core a seed) or paper (a GPU; the scripts' defaults)
#     EXPERIMENT   online    RL+SL, RL without the decoder, without VQ as well, PPO from scratch (paper section 6.3)
#                  offline   16 ... 4096 labels (paper: 8192): LAPO + decoder (section 6.4), cloning from scratch, VPT's
#                            pseudo-labels from scratch; ours: VPT from LAPO's networks
#                  all       both
#                  stochastic, bottleneck, transfer, delay, video: questions.py (small; coinrun, FrozenLake-v1)
#
#     benchmark/experiments.sh small all coinrun 1 2 3
#     python benchmark/collect_results.py --runs-dir runs/small && python benchmark/plot.py
#
# What is finished is skipped, what was interrupted goes on. THREADS=1 gives each process one core.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
if [ $# -lt 4 ]; then
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3- >&2
    exit 1
fi
SCALE=$1 EXPERIMENT=$2 ENV_ID=$3
shift 3
OUT=runs/$SCALE
DATA=$OUT/data/$ENV_ID
if [ -n "${THREADS:-}" ]; then export OMP_NUM_THREADS=$THREADS; fi

# PPO from scratch is LAPO's PPO with a fresh network of the policy's size, at a constant rate
PPO=(--num-steps 64 --ent-coef 0.0025 --learning-rate 5e-4 --no-anneal-lr)
case $SCALE in
small) # the quickstart's data and shapes, a twenty-fifth of the paper's frames online
    UPDATES=8000 # docs/results.md says why
    if [ "$ENV_ID" = coinrun ]; then UPDATES=2000; fi
    case $ENV_ID in
    coinrun | fruitbot) CURATE=0 FRAMES=(65536 8192) ;;
    *) CURATE=1 FRAMES=(262144 32768) ;; # their demonstrators know only some levels: see benchmark/curate.py
    esac
    COLLECT=(--expert-checkpoint "experts/$ENV_ID.pt" --num-train-frames "${FRAMES[0]}" --num-test-frames "${FRAMES[1]}")
    PRETRAIN=(--num-updates "$UPDATES" --batch-size 32 --learning-rate 5e-4 --warmup-updates 500
        --patch-size 2 --idm-scale 1 --fdm-width 16 --vq-dim 4 --predict-change --eval-every 500)
    BC=(--num-updates 5000 --batch-size 64 --learning-rate 1e-3 --warmup-updates 50 --policy-scale 1)
    # the paper's warm-ups divided by five: they would take most of this run, a twenty-fifth of them less than a rollout
    FINETUNE=(--total-timesteps 163840 --action-head-warmup 7000 10000 --value-head-warmup 5000 10000
        --linear-warmup 10000 40000)
    PPO+=(--total-timesteps 163840 --scale 1 --patch-size 2 --num-levels 16) # the policy's shape, experts' levels
    LABELS=(--num-labels 16 64 256 1024 4096 --num-draws 2 --eval-episodes 60 --temperature 0.5)
    DECODE=("${LABELS[@]}" --decoder-updates 200 --cloning-updates 500 --cloning-epochs 20 --policy-batch-size 64)
    VPT=("${LABELS[@]}" --idm-epochs 30 --policy-updates 1000 --batch-size 64
        --idm-scale 1 --policy-scale 1 --patch-size 2)
    FRESH=3e-3 # the learning rate of networks that begin untrained: cloning's, and VPT's
    ;;
paper)
    CURATE=0 COLLECT=() PRETRAIN=() BC=() FINETUNE=() DECODE=() VPT=() FRESH=5e-4
    PPO+=(--total-timesteps 4000000 --scale 4)
    ;;
*)
    echo "error: SCALE is $SCALE, expected small or paper" >&2
    exit 1
    ;;
esac
case $EXPERIMENT in
online | offline | all) ;;
stochastic | bottleneck | transfer | delay | video)
    if [ "$SCALE" = paper ]; then
        echo "error: SCALE is paper, but $EXPERIMENT is asked at small only" >&2
        exit 1
    fi
    exec "$PYTHON" benchmark/questions.py "$EXPERIMENT" "$ENV_ID" "$@"
    ;;
*)
    echo "error: EXPERIMENT is $EXPERIMENT, none of those that \`$0\` lists" >&2
    exit 1
    ;;
esac

run() { # SCRIPT RUN_NAME SEED flags...: skips a finished run; AFTER names the run that it starts from. -m MODULE: a tool
    local script=$1 name=$2 seed=$3
    shift 3
    local results=$OUT/${ENV_ID}__${name}__$seed/results.json
    local command="$script --env-id $ENV_ID --exp-name $name --seed $seed --runs-dir $OUT${*:+ $*}"
    if [ -f "$results" ]; then
        if ! grep -qF "\"command\": \"python $command\"" "$results"; then
            echo "error: $results was made with other flags than today's, so that seeds would not compare: move its folder away" >&2
            exit 1
        fi
        if [ "$results" -ot "$OUT/${ENV_ID}__${AFTER:-}/results.json" ]; then
            echo "error: $results is older than $AFTER, which it started from, so it is of an earlier one: move its folder away" >&2
            exit 1
        fi
        return
    fi
    echo "== $PYTHON $command"
    # shellcheck disable=SC2086 # a tool's script is two words
    "$PYTHON" $script --env-id "$ENV_ID" --exp-name "$name" --seed "$seed" --runs-dir "$OUT" "$@"
}

if [ "$SCALE" = paper ]; then run ppo_procgen.py ppo_procgen 1; fi # the demonstrator
if [ "$CURATE" = 1 ]; then RAW=$DATA-all; else RAW=$DATA; fi
AFTER=ppo_procgen__1 run collect_expert_data.py collect_expert_data 1 --data-dir "$RAW" "${COLLECT[@]}" # one dataset for all seeds
if [ "$CURATE" = 1 ] && [ ! -f "$DATA/meta.json" ]; then "$PYTHON" benchmark/curate.py "$RAW" "$DATA"; fi
of() { echo "$OUT/${ENV_ID}__${1}__$seed/checkpoint.pt"; } # the checkpoint of a run, of this seed
for seed in "$@"; do
    AFTER=collect_expert_data__1 run lapo_pretrain.py lapo_pretrain "$seed" --data-dir "$DATA" "${PRETRAIN[@]}"
    AFTER=lapo_pretrain__$seed run "-m tools.inspect_latents" inspect_latents "$seed" --data-dir "$DATA" --eval-windows 2048 \
        --action-updates 600
    AFTER=lapo_pretrain__$seed run lapo_bc.py lapo_bc "$seed" --data-dir "$DATA" "${BC[@]}"
    AFTER=lapo_bc__$seed
    if [ "$EXPERIMENT" != online ]; then
        run lapo_decode.py lapo_decode "$seed" --data-dir "$DATA" --cloning-learning-rate "$FRESH" "${DECODE[@]}"
        run vpt.py vpt_lapo "$seed" --data-dir "$DATA" --pretrain-checkpoint "$(of lapo_pretrain)" \
            --bc-checkpoint "$(of lapo_bc)" "${VPT[@]}"
        AFTER=collect_expert_data__1 run vpt.py vpt "$seed" --data-dir "$DATA" --learning-rate "$FRESH" "${VPT[@]}"
    fi
    if [ "$EXPERIMENT" != offline ]; then
        run lapo_finetune_ppo.py rl_sl "$seed" "${FINETUNE[@]}"
        run lapo_finetune_ppo.py rl_no_sl "$seed" --no-sl "${FINETUNE[@]}"
        AFTER=collect_expert_data__1 run ppo_procgen.py ppo_from_scratch "$seed" "${PPO[@]}"
        AFTER=collect_expert_data__1 run lapo_pretrain.py lapo_pretrain_no_vq "$seed" --no-vq --data-dir "$DATA" "${PRETRAIN[@]}"
        AFTER=lapo_pretrain_no_vq__$seed run "-m tools.inspect_latents" inspect_latents_no_vq "$seed" --data-dir "$DATA" \
            --pretrain-checkpoint "$(of lapo_pretrain_no_vq)" --eval-windows 2048
        AFTER=lapo_pretrain_no_vq__$seed run lapo_bc.py lapo_bc_no_vq "$seed" --data-dir "$DATA" \
            --pretrain-checkpoint "$(of lapo_pretrain_no_vq)" "${BC[@]}"
        AFTER=lapo_bc_no_vq__$seed run lapo_finetune_ppo.py no_vq "$seed" --no-sl --bc-checkpoint "$(of lapo_bc_no_vq)" \
            "${FINETUNE[@]}"
    fi
done
