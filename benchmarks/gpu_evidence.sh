#!/usr/bin/env bash
# Do criteria differ? A comparison on a GPU: cifar_resnet32x4 → cifar_resnet8x4 on 100 classes of Tiny ImageNet at 32.
#   benchmarks/gpu_evidence.sh DATA OUTPUT [EPOCHS] [flags of train_distill.py]
# DATA is a folder that `datasets` loads (image, label; train, test). EPOCHS, of teacher and student, is 40 by default;
# the milestones of the recipe are scaled with it. The seeds run side by side, since networks this small leave a GPU
# mostly idle. After an interruption the same command continues: give what is left over ten minutes to `timeout`, as in
#   timeout -s TERM 580 benchmarks/gpu_evidence.sh DATA OUTPUT; timeout -s TERM 580 benchmarks/gpu_evidence.sh DATA OUTPUT
# OUTPUT/runs gets compare.md, compare.json and links to the runs, which are in OUTPUT/seed-N. CRITERIA, SEEDS and
# MIXED_PRECISION may be set.
set -euo pipefail
usage='usage: benchmarks/gpu_evidence.sh DATA OUTPUT [EPOCHS] [flags of train_distill.py]'
data=${1:?$usage}
output=${2:?$usage}
shift 2
epochs=40
if [[ $# -gt 0 && $1 != -* ]]; then
  epochs=$1
  shift
fi
[[ $epochs =~ ^[1-9][0-9]*$ ]] || { echo "gpu_evidence.sh: error: EPOCHS $epochs: expected a whole number" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
read -ra criteria <<<"${CRITERIA:-none kd dkd rld rld:standardize=true}"
read -ra seeds <<<"${SEEDS:-0 1 2}"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
mkdir -p "$output"

# as in the recipe, at 0.65, 0.78 and 0.9 of the epochs; its ramp of 5 of 60
milestones=($((epochs * 65 / 100)) $((epochs * 78 / 100)) $((epochs * 9 / 10)))
compare() { # FOLDER [flags]; in the place of a shell, so that a signal reaches it
  local folder=$1
  shift
  exec "$python" -m timm_rld compare --output "$folder" --config "$root/configs/tiny100/resnet32x4_resnet8x4.yaml" \
    --dataset "hfds/$data" --mixed-precision "${MIXED_PRECISION:-bf16}" --teacher-cache "$output/cache" \
    --epochs "$epochs" --teacher-epochs "$epochs" --decay-milestones "${milestones[@]}" --no-speed "${flags[@]}" "$@"
}
flags=("$@")
children=()
stop() { # a comparison passes the signal on to its run, which writes a checkpoint
  for child in "${children[@]}"; do kill -TERM "$child" 2>/dev/null || true; done
  wait
  exit 143
}
trap stop TERM INT

start() {
  compare "$@" &
  children+=($!)
}
# the teacher alone is trained first, by the first seed's comparison, as all share it
first=${seeds[0]}
if [[ ! -e $output/runs/teacher/results.json ]]; then
  start "$output/runs" --seeds "$first" --criteria "${criteria[0]}"
  wait "${children[0]}"
  children=()
fi
for seed in "${seeds[@]}"; do # each in a folder of its own, since a comparison locks its folder
  folder=$output/seed-$seed
  if [[ ! -e $folder/settings.yaml ]]; then
    rm -rf "$folder"
    mkdir "$folder"
    cp -r "$output/runs/teacher" "$folder"
    cp "$output/runs/settings.yaml" "$folder"
  fi
  start "$folder" --seeds "$seed" --criteria "${criteria[@]}" >"$output/seed-$seed.log" 2>&1
done
failed=0
for child in "${children[@]}"; do wait "$child" || failed=1; done
[[ $failed = 0 ]] || tail -n 3 "$output"/seed-*.log >&2
for run in "$output"/seed-*/*-seed*; do
  name=${run##*/}
  if [[ -e $run/results.json && ! -e $output/runs/$name ]]; then
    ln -s "../$(basename "$(dirname "$run")")/$name" "$output/runs/$name"
  fi
done
# all of it: no run is repeated but those that failed
children=()
start "$output/runs" --seeds "${seeds[@]}" --criteria "${criteria[@]}"
wait "${children[0]}"
