#!/usr/bin/env bash
# The worked example of docs/own-data.md: films of a small world, and the same with what goes wrong in films, each
# through import, pretraining and report → benchmark/results/own-videos.json. What is finished is skipped.
#     benchmark/own_videos.sh             SEED=2 OUT=runs/own_videos_2 benchmark/own_videos.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-1}
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/own_videos} # films, datasets and run folders
JSON=${JSON:-benchmark/results/own-videos.json}
export OMP_NUM_THREADS=1

films() { # NAME flags of make_example_films...
    local folder=$OUT/films/$1
    if [ ! -f "$folder/labels.csv" ]; then
        "$PYTHON" -m tools.make_example_films "$folder" --seed "$SEED" "${@:2}"
    fi
}

common() { # NAME: the flags of all stages
    COMMON=(--env-id example --seed "$SEED" --data-dir "$OUT/$1/data" --runs-dir "$OUT/$1")
    DONE=$OUT/$1/example__
}

import_films() { # NAME FILMS flags of import_videos...
    common "$1"
    if [ ! -f "$OUT/$1/data/meta.json" ]; then
        "$PYTHON" -m tools.import_videos "$OUT/films/$2" --env-id example --seed "$SEED" \
            --data-dir "$OUT/$1/data" --labels "$OUT/films/$2/labels.csv" --num-test-frames 512 "${@:3}"
    fi
}

look() { # NAME flags of inspect_latents...
    common "$1"
    if [ ! -f "${DONE}inspect_latents__$SEED/results.json" ]; then
        "$PYTHON" -m tools.inspect_latents "${COMMON[@]}" --num-groups 5 "${@:2}"
    fi
}

try() { # NAME FILMS flags of import_videos...: import, pretraining, report
    import_films "$@"
    if [ ! -f "${DONE}lapo_pretrain__$SEED/results.json" ]; then
        "$PYTHON" lapo_pretrain.py "${COMMON[@]}" \
            --num-updates 600 --batch-size 32 --learning-rate 1e-3 --warmup-updates 100 \
            --no-vq --vq-num-codebooks 1 --vq-num-slots 1 --vq-dim 4 \
            --patch-size 2 --idm-scale 0.5 --fdm-width 8 --predict-change --no-bf16 \
            --eval-every 100 --eval-windows 512
    fi
    look "$1"
}

mkdir -p "$OUT"
films base
films late --label-delay 3
films cuts --cuts 15
films clock --clock
films split --actors 2
films rate --frames-per-action 4
films follows --camera follows
films drifts --camera drifts
films crowd --distractors 6

try base base
import_films late late
look late --pretrain-checkpoint "$OUT/base/example__lapo_pretrain__$SEED/checkpoint.pt"
try cuts cuts
try cuts-mended cuts --cut-threshold 0.1
try clock clock
try clock-mended clock --crop 0 0 128 112
try rate rate
try rate-mended rate --fps 10
try split split
try split-mended split --crop 0 0 128 128
try drifts drifts
try crowd crowd
try follows follows

common base
if [ ! -f "${DONE}lapo_bc__$SEED/results.json" ]; then
    "$PYTHON" lapo_bc.py "${COMMON[@]}" --num-updates 600 --batch-size 64 --learning-rate 1e-3 \
        --warmup-updates 50 --eval-every 200 --policy-scale 0.5
fi
if [ ! -f "${DONE}score_labels__$SEED/results.json" ]; then
    "$PYTHON" -m tools.score_labels "${COMMON[@]}" --num-labels 32 128 --num-draws 5 \
        --cloning-updates 200 --policy-batch-size 64
fi

"$PYTHON" - "$OUT" "$SEED" "$JSON" <<'END'
import json
import sys
from pathlib import Path

import numpy as np

out, seed, path = sys.argv[1:]


def read(name, stage):
    return json.loads(Path(out, name, f"example__{stage}__{seed}", "results.json").read_text())


runs = {}
for folder in sorted(Path(out).glob(f"*/example__inspect_latents__{seed}")):
    name = folder.parent.name
    report = read(name, "inspect_latents")
    trained = read("base" if name == "late" else name, "lapo_pretrain")
    spaces = ("trained", "untrained_idm", "shuffled_actions")
    probes = {space: report["latent_space"][space]["linear_probe"] for space in spaces}
    shifts = report["accuracy_by_shift"]
    best = max(shifts, key=shifts.get)
    first = [np.load(Path(out, name, "data", split, "first.npy")) for split in ("train", "test")]
    runs[name] = {
        "train_frames": len(first[0]),
        "streams": int(sum(x.sum() for x in first)),
        "test/fdm_loss": trained["test/fdm_loss"],
        "test/copy_last_frame_loss": trained["test/copy_last_frame_loss"],
        "test/other_latent_cost": trained["test/other_latent_cost"],
        "linear_probe": probes,
        "cluster_purity": report["latent_space"]["trained"]["cluster_purity"],
        "largest_group": max(report["groups"]["windows"]) / report["windows"],
        "best_shift": int(best),
        "accuracy_at_best_shift": shifts[best],
        "accuracy_at_0": shifts["0"],
        "variance_between_episodes": report["worth"]["variance_between_episodes"],
        "pretraining_seconds": trained["wall_seconds"],
        "commit": trained["commit"],
    }
    print(name, json.dumps(runs[name]))
scores = read("base", "score_labels")["curve"]
for row in scores:
    print(row["method"], row["n_labels"], row["accuracy_mean"], row["accuracy_stderr"])
Path(path).write_text(json.dumps({"seed": int(seed), "runs": runs, "score_labels": scores}, indent=2) + "\n")
END
