#!/usr/bin/env bash
# One call on a machine with a GPU: checks at real sizes, then times, then the page of results.
#
#   OUT=out bash benchmarks/gpu_session.sh          # 8 minutes at most; MINUTES=... for more or less
#
# Needs Python (PYTHON=... names one) with torch and Triton, and nothing else; installs nothing.
# Leaves in $OUT (by default benchmarks/results): gpu-checks-<device>.json, kernels-<device>.json.
# Ends with 1 where a check is red, after everything else has run.
set -u
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
minutes="${MINUTES:-8}"
began=$SECONDS

# The packages by one link, whatever became of the links in typings/ on the way here.
links="$(mktemp -d)"
trap 'rm -rf "$links"' EXIT
ln -s "$PWD" "$links/mendel"
export PYTHONPATH="$links" OMP_NUM_THREADS=1

device="$("$python" -c '
import re, torch
if torch.cuda.is_available():
    print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')" || exit 2
if [ -z "$device" ]; then
  echo "gpu_session: torch sees no CUDA device here" >&2
  exit 2
fi
mkdir -p "$out"
red=0

# A third for the checks: what they compile, the bench finds compiled.
"$python" tests/gpu_cases.py --device cuda --out "$out/gpu-checks-$device.json" \
  --seconds "$((minutes * 20))" || red=1

left="$(((minutes * 60 - SECONDS + began - 20) / 6))"
"$python" -m mendel.kernels.bench --device cuda --out "$out/kernels-$device.json" \
  --minutes "$((left / 10)).$((left % 10))" || red=1

echo "gpu_session: $((SECONDS - began)) s, $([ $red = 0 ] && echo all green || echo some red)"
exit $red
