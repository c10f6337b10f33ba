#!/usr/bin/env bash
# Builds, tests, sanitizes and benchmarks drcnn on a CUDA machine:  bash bench/gpu.sh
#
# Uses the Python of the environment that is active; PYTHON chooses another. The CSV file of the device is left
# in bench/results/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}

section() { printf '\n== %s ==\n' "$*"; }

section "device"
nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv

section "build"
DRCNN_CUDA=1 "$python" -m pip install -e '.[test]'
"$python" -m drcnn.doctor || true
"$python" - <<'PYTHON'
import torch

from drcnn.ops import backend_status

if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
served = {choice.op: choice.backend for choice in backend_status() if choice.device_type == "cuda"}
others = ", ".join(f"{op} by {backend}" for op, backend in served.items() if backend != "native")
if others:
    raise SystemExit(f"on CUDA not served by native: {others}")
PYTHON

section "tests on the GPU"
"$python" -m pytest -m gpu

if command -v compute-sanitizer > /dev/null; then
  # PyTorch's caching allocator would hide an access behind the end of a tensor.
  for tool in memcheck racecheck; do
    section "compute-sanitizer $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q tests/ops -m gpu -k "native and not million and not compile and not graph"
  done
else
  section "compute-sanitizer is not installed: not run"
fi

section "benchmarks"
"$python" -m pytest bench/ --benchmark

section "detectors beside torchvision's, and Table 6"
"$python" -m drcnn.benchmark --batch-sizes 1 8 --dtypes fp32 bf16
"$python" -m drcnn.benchmark --table6
