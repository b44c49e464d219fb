#!/bin/bash
# A piece of the joint model on one host with two GPUs or more: scenes are written by the processors, the last card draws
# them (the others help at first), and the others train. With the recipe of the last row of page 50:
#
#     bash tools/joint.sh runs/joint --own-from .6 --own-steps 4 --astray .5 --rows 16 --led .3 --mishear .08
#
# What follows the folder goes to `tools/tiny.py joint`. May be set: MINUTES=20 (all in all), WRITERS=36, FILES=300 (of 80
# scenes), LEAST=16 (files before the training begins), START=data_samples/weights/midas.
set -u
trap 'kill $(jobs -p) 2>/dev/null' EXIT
out=${1:?where to, such as runs/joint}; shift; mkdir -p "$out"
cards=$(nvidia-smi -L | wc -l); last=$((cards-1)); born=$(date +%s)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
have() { find "$out/pool" -name '*.safetensors' 2>/dev/null | wc -l; }
draw() { python3 tools/tiny.py draw "$out/scenes" "$out/pool" --device "cuda:$1" --first "$2" --workers 5 --led 1 > "$out/draw_$2.log" 2>&1 & drawer=$!; }

nice -n 5 python3 tools/tiny.py scenes "$out/scenes" --writers "${WRITERS:-36}" --files "${FILES:-300}" --first "${FIRST:-2100000}" > "$out/scenes.log" 2>&1 &
helpers=()
for card in $(seq 0 $last); do draw "$card" $((3000000 + card*100000)); [ "$card" -lt $last ] && helpers+=("$drawer"); done
first=$drawer                                                                     # draws to the end
while [ "$(have)" -lt "${LEAST:-16}" ]; do
  kill -0 "$first" 2>/dev/null || { echo "the drawing has ended:"; tail -n 3 "$out"/draw_*.log; exit 1; }
  sleep 1
done
kill "${helpers[@]}"; draw "$last" 3900000                                        # two on the last card
spent=$(( $(date +%s) - born ))
CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((last-1))) python3 -m torch.distributed.run --standalone --nproc-per-node $last tools/tiny.py joint "$out" --pool "$out/pool" --start-from "${START:-data_samples/weights/midas}" \
  --minutes "$(python3 -c "print(${MINUTES:-20} - $spent/60)")" "$@" > "$out/joint.log" 2>&1 || { tail -n 5 "$out/joint.log"; exit 1; }
touch "$out/pool/stop"; echo "$out/midas"
