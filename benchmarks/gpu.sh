#!/usr/bin/env bash
# Run all benchmarks that matter on a machine with a GPU: one command, at most ten minutes, no network.
#
#   benchmarks/gpu.sh OUT DATA
#
# OUT: directory for JSON files, figures and logs. DATA: directory of cifar-10-batches-py, or cifar-10-python.tar.gz.
# Variables: PYTHON (python3); LIMIT, seconds in total (570); BENCH, seconds per comparison (40; 0 for none); IMAGES
# (50000); ITERATIONS per round (20); RUNS, "recipe:seeds" in order, as many as fit; EPOCHS (the recipe's own); SET, one
# more override; UNPACK, a command that writes cifar-10-batches-py to the directory appended to it (DATA is then that
# directory).
# A failing step is reported and the next one starts; the exit status is 1 if any step failed.
set -uo pipefail
out=$(mkdir -p "${1:?OUT DATA}" && cd "$1" && pwd) || exit 2
data=$(realpath -m "${2:?OUT DATA}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} limit=${LIMIT:-570} bench=${BENCH:-40} failed=0
runs=${RUNS:-se_fast:5 stochastic_fast:5}

run_step() { # NAME COMMAND...: output goes to the terminal and to OUT/NAME.log; stopped when the time is up
	local name=$1 left=$((limit - SECONDS))
	shift
	if ((left < 20)); then
		echo "== $name: no time left"
		return
	fi
	echo "== $name (after $SECONDS s)"
	timeout --signal=INT --kill-after=15 "$((left - 15))" "$@" 2>&1 | tee "$out/$name.log"
	local status=${PIPESTATUS[0]}
	((status == 0)) || { echo "== $name: exit status $status"; failed=1; }
}

if [[ -n ${UNPACK:-} ]]; then
	run_step unpack $UNPACK "$data"
elif [[ -f $data ]]; then
	mkdir -p "$out/.data" && run_step unpack tar -xzf "$data" -C "$out/.data"
	data=$out/.data
fi
"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")' |
	tee "$out/machine.txt"

cases="128:off 128:on 512:off 512:on"
((bench == 0)) && cases=
for case in $cases; do
	batch=${case%:*} compile=${case#*:}
	# Other batch sizes and dataset sizes are measured once.
	sizes=(--batch-sizes --dataset-sizes)
	[[ $case == 128:off ]] && sizes=()
	run_step "throughput_${batch}_${compile}" "$python" -m benchmarks.throughput --images "${IMAGES:-50000}" \
		--iterations "${ITERATIONS:-20}" --seconds "$bench" --profile --out "$out/throughput_${batch}_${compile}" \
		--set "data.batch_size=$batch" --set "compile=$compile" "${sizes[@]}" ${SET:+--set "$SET"}
done

for run in $runs; do
	recipe=${run%:*} seeds=${run#*:}
	# If time runs out, FILE.json holds the seeds that are done.
	run_step "accuracy_$recipe" "$python" -m benchmarks.accuracy --config "configs/$recipe.json" --seeds "$seeds" \
		--out "$out/accuracy_$recipe" ${EPOCHS:+--set "train.epochs=$EPOCHS"} --set "data.root=$data" \
		--set "output_dir=$out/.runs" ${SET:+--set "$SET"}
done
exit "$failed"
