#!/usr/bin/env bash
# Run all benchmarks that matter on a machine with a GPU: one command, at most ten minutes, no network.
#
#   benchmarks/gpu.sh OUT DATA
#
# OUT: directory for JSON files, figures and logs. DATA: directory of cifar-10-batches-py, or cifar-10-python.tar.gz.
# In this order: installation, resuming bit by bit, accuracies, throughputs, more accuracies. An estimate of the seconds
# is printed first, and a table of all results last. Each result is written when it exists; what does not fit into the
# time is cut or left out.
#
# Variables: PYTHON (python3); LIMIT, seconds in total (570); RUNS and MORE_RUNS, "recipe:seeds" before and after the
# throughputs (RUNS with one more run each, for the time to an accuracy); CASES, "batch:compile" of the throughputs;
# BENCH, seconds per case (15); KILLS, interrupted runs (1); RATE, images per second that the estimate assumes (20000: an
# H100 trained 45,000 compiled, 22,000 not); JOBS, seeds trained at once (1; ten at once took four times as long as one
# on an H100, so the estimate is too high, and their times are not those of a run alone); IMAGES (50000); ITERATIONS per
# round (20); EPOCHS (the recipe's own); SET, more overrides, separated by spaces; UNPACK, a command that writes
# cifar-10-batches-py to the directory appended to it (DATA is then that directory).
# With two calls: RUNS=se_fast:5 JOBS=5 CASES= MORE_RUNS= first, then RUNS= CASES="128:off 128:on 512:off 512:on" BENCH=30.
# A failing step is reported and the next one starts, but nothing runs without a working installation. The exit status
# is 1 if any step failed.
set -uo pipefail
out=$(mkdir -p "${1:?OUT DATA}" && cd "$1" && pwd) || exit 2
data=$(realpath -m "${2:?OUT DATA}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} limit=${LIMIT:-570} bench=${BENCH:-15} kills=${KILLS:-1} failed=0 mode=plan planned=0
jobs=${JOBS:-1} runs=${RUNS-se_fast:1} more_runs=${MORE_RUNS-stochastic_fast:1} cases=${CASES-128:off 128:on}
overrides=()
for item in ${SET:-}; do overrides+=(--set "$item"); done

# NAME SECONDS COMMAND...: print the estimate, or run the command for at most CAP seconds, with its output in OUT/NAME.log
run_step() {
	local name=$1 seconds=$2 left=$((limit - SECONDS)) cap=${CAP:-$limit}
	shift 2
	if [[ $mode == plan ]]; then
		planned=$((planned + seconds))
		printf '%-26s %5d s %6d s in total\n' "$name" "$seconds" "$planned"
		return
	fi
	if ((left < 20)); then
		echo "== $name: no time left"
		return
	fi
	echo "== $name (after $SECONDS s)"
	timeout --signal=INT --kill-after=15 "$((left - 15 < cap ? left - 15 : cap))" "$@" 2>&1 | tee "$out/$name.log"
	local status=${PIPESTATUS[0]}
	((status == 0)) || { echo "== $name: exit status $status"; failed=1; }
	return "$status"
}

measure_accuracy() { # RECIPE:SEEDS [--no-curve]: the seeds, and one run with validation
	local recipe=${1%:*} seeds=${1#*:} epochs
	epochs=${EPOCHS:-$("$python" -c "from pathlib import Path
from cifar_ignite.config_io import load_config
print(load_config(Path('configs/$recipe.json')).train.epochs)")} || { failed=1; return; }
	run_step "accuracy_$recipe" "$(((seeds + 2 - $#) * (epochs * 50000 / ${RATE:-20000} + 30)))" \
		"$python" -m benchmarks.accuracy --config "configs/$recipe.json" --seeds "$seeds" --jobs "$jobs" "${@:2}" \
		--out "$out/accuracy_$recipe" ${EPOCHS:+--set "train.epochs=$EPOCHS"} --set "data.root=$data" \
		--set "output_dir=$out/.runs" "${overrides[@]}"
}

measure_throughput() { # BATCH:COMPILE; other batch sizes and dataset sizes are measured once
	local batch=${1%:*} compile=${1#*:} sizes=(--batch-sizes --dataset-sizes) seconds=$((bench + 20))
	[[ $1 == "${cases%% *}" ]] && sizes=() seconds=$((seconds + bench / 4 + 10))
	[[ $compile == on ]] && seconds=$((seconds + 40))
	run_step "throughput_${batch}_${compile}" "$seconds" "$python" -m benchmarks.throughput \
		--images "${IMAGES:-50000}" --iterations "${ITERATIONS:-20}" --seconds "$bench" --profile \
		--out "$out/throughput_${batch}_${compile}" --set "data.batch_size=$batch" --set "compile=$compile" \
		"${sizes[@]}" "${overrides[@]}"
}

run_all() {
	local item
	run_step doctor 15 "$python" -m cifar_ignite doctor --set "data.root=$data" --set "output_dir=$out" || return 1
	((kills == 0)) || CAP=150 run_step faults "$((35 + 65 * kills))" \
		"$python" -m benchmarks.faults --runs "$kills" --jobs 1 --config configs/se_fast.json --set compile=on \
		--set data.dataset=synthetic --set data.synthetic.train_size=5000 --set data.val_size=500 \
		--set train.epochs=3 --set train.save_every_seconds=1 "${overrides[@]}"
	for item in $runs; do measure_accuracy "$item"; done
	for item in $cases; do measure_throughput "$item"; done
	for item in $more_runs; do measure_accuracy "$item" --no-curve; done
	return 0
}

if [[ -n ${UNPACK:-} ]]; then
	$UNPACK "$data" || exit 1
elif [[ -f $data ]]; then
	mkdir -p "$out/.data" && tar -xzf "$data" -C "$out/.data" || exit 1
	data=$out/.data
fi
echo "== estimate, at ${RATE:-20000} images per second in training; the limit is $limit s"
run_all
mode=run
run_all
echo "== results (after $SECONDS s)"
"$python" -m benchmarks.summary "$out" || failed=1
exit "$failed"
