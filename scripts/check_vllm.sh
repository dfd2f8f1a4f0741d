#!/bin/sh
# Runs tests/test_integration_vllm.py on vLLM's own classes, with a CPU build of torch; no GPU is needed.
#
#   scripts/check_vllm.sh [FOLDER]    an environment there (6 GB, some minutes; kept and used again), by default
#                                     ${TMPDIR:-/tmp}/fastpool-vllm
#
# VLLM and TORCH name other releases. torch goes in first, and no newer than the CPU build at hand: vLLM's own pin would
# bring a CUDA build of several gigabytes.
set -eu
cd "$(dirname "$0")/.."

FOLDER=${1:-${TMPDIR:-/tmp}/fastpool-vllm}
VLLM=${VLLM:-vllm==0.32.0}
TORCH=${TORCH:-torch==2.13.0}
PYTHON="$FOLDER/bin/python"

if ! [ -e "$FOLDER/ready" ]; then
    "${BASE_PYTHON:-python3}" -m venv "$FOLDER"
    "$PYTHON" -m pip install -q "$TORCH" "$VLLM"
    # Built for the torch that vLLM pins; beside another one they fail to load, and take vLLM's imports with them.
    "$PYTHON" -m pip uninstall -q -y torchvision torchaudio torchcodec
    "$PYTHON" -m pip install -q "setuptools>=77" cmake ninja pybind11 pytest
    touch "$FOLDER/ready"
fi

# From a copy, built anew each time: an install from the checkout itself would take up what other builds have left there.
rm -rf "$FOLDER/sources"
mkdir "$FOLDER/sources"
cp -r setup.py pyproject.toml CMakeLists.txt MANIFEST.in README.md LICENSE csrc python triton_kernels "$FOLDER/sources"
FASTPOOL_CUDA=0 FASTPOOL_NATIVE=1 "$PYTHON" -m pip install -q --no-build-isolation --no-deps --force-reinstall \
    "$FOLDER/sources"

# -P, and pytest by its own name: from the checkout's folder vLLM would take up triton_kernels as if it were Triton's.
"$PYTHON" -P - <<'EOF'
import vllm
from vllm.plugins import load_general_plugins

load_general_plugins()
from vllm.model_executor.layers.pooler.seqwise import MeanPool

assert MeanPool.forward.__module__ == "fastpool.integrations.vllm", "vLLM did not load the plugin"
print("vLLM", vllm.__version__, "loaded the plugin by its entry point")
EOF
exec "$FOLDER/bin/pytest" tests/test_integration_vllm.py
