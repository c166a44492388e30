#!/usr/bin/env bash
# What only a machine with CUDA can tell, in under ten minutes: `bash tests/gpu.sh`, from any folder. Where there is
# more time, STUDIES_S and TESTS_S are the seconds that the smoke run and the unit tests may take.
#
# Speeds and the equality of two trainings, every study at the smoke preset, and the unit tests, with whatever python3
# (or $PYTHON) has torch. Nothing is installed and nothing is fetched; what a missing package forbids is skipped aloud.
# It runs without CUDA too, and says so. Ends with 1 when something failed, with 2 when nothing could run.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CACHE_ROOT="$scratch/cache" PYTHONUNBUFFERED=1
summary=() failed=0 ran=0
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
workers=$((cores < 8 ? cores : 8))

missing() {  # those of the modules named that this python lacks
  "$python" -c 'import importlib.util, sys
print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])' "$@"
}

part() {  # name, seconds at most, modules that it needs, command: its end is shown, and its status counts
  local name=$1 limit=$2 needs lacks started=$SECONDS status word took
  read -ra needs <<<"$3"
  shift 3
  lacks=$(missing "${needs[@]}")
  if [ -n "$lacks" ]; then
    summary+=("$(printf '%-44s skipped: no %s' "$name" "${lacks// /, }")")
    return
  fi
  echo "== $name"
  timeout -s INT -k 20 "$limit" "$@" >"$scratch/log" 2>"$scratch/errors"
  status=$?
  tail -n 15 "$scratch/log"
  [ "$status" = 0 ] || tail -n 5 "$scratch/errors"
  ran=1 took=$((SECONDS - started)) word=passed
  if [ "$status" != 0 ] && [ "$took" -ge "$limit" ] && ! grep -qE '^(FAILED|ERROR) ' "$scratch/log"; then
    word="not finished in $limit s"
  elif [ "$status" != 0 ]; then
    word="FAILED ($status)" failed=1
  fi
  summary+=("$(printf '%-44s %s, %d s' "$name" "$word" "$took")")
}

"$python" -c 'import platform, sys, torch
place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU: this machine has no CUDA that torch sees"
print(f"Python {platform.python_version()}, torch {torch.__version__}, {place}")' || exit 2

base="numpy pandas scipy filelock joblib safetensors torchvision"
room="$base IPython nbformat papermill nbconvert jinja2 yaml psutil torch_pruning latex2mathml matplotlib seaborn tqdm"
part "speeds, and whether two trainings are equal" 60 "$base" "$python" tests/benchmarks/device.py
part "every study at the smoke preset" "${STUDIES_S:-280}" "$room ipykernel" \
  "$python" -m lib.reproduce --preset smoke --reports "$scratch/smoke" --jobs "$((workers < 4 ? workers : 4))"

together=() without=()  # of the batch, its pages and Snakemake the smoke run has told what there is of CUDA
for file in tests/test_{paper,snakefile,reproduce,reports}.py; do without+=(--ignore "$file"); done
[ -n "$(missing xdist)" ] || together=(-n "$workers" --dist loadfile --max-worker-restart 0)
if [ -z "$(missing pytest)" ]; then  # files that cannot be imported without a package, or would run a notebook
  "$python" -m pytest --collect-only -q -p no:cacheprovider >"$scratch/collected" 2>&1
  mapfile -t left < <(sed -n "s/^ERROR \(tests[^ ]*\) - ModuleNotFoundError.*/\1/p" "$scratch/collected")
  [ -z "$(missing $room)" ] || left+=(tests/test_{examples,study}.py)
  for file in "${left[@]}"; do without+=(--ignore "$file"); done
  [ "${#left[@]}" = 0 ] || summary+=("$(printf '%-44s skipped: no %s' "unit tests of ${#left[@]} files" "$(missing $room)")")
fi
part "unit tests" "${TESTS_S:-220}" "pytest $base" "$python" -m pytest -q -p no:cacheprovider "${together[@]}" "${without[@]}"

printf '\n%s\n' "== summary"
printf '%s\n' "${summary[@]}"
[ "$ran" = 1 ] || exit 2
exit "$failed"
