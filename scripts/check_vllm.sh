#!/bin/sh
# Runs tests/integrations/vllm on vLLM's own classes, with a CPU build of torch; no GPU is needed.
#
#   scripts/check_vllm.sh [FOLDER]    an environment there (6 GB, some minutes; kept and used again), by default
#                                     ${TMPDIR:-/tmp}/fastpool-vllm
#
# VLLM and TORCH name other releases. torch goes in first, and no newer than the CPU build at hand: vLLM's own pin would
# bring a CUDA build of several gigabytes.
set -eu
cd "$(dirname "$0")/.."

FOLDER=${1:-${TMPDIR:-/tmp}/fastpool-vllm}

install_engine() {
    "$PYTHON" -m pip install -q "$TORCH" "${VLLM:-vllm==0.32.0}"
    # Built for the torch that vLLM pins; beside another one they fail to load, and take vLLM's imports with them.
    "$PYTHON" -m pip uninstall -q -y torchvision torchaudio torchcodec
}

. scripts/engine_environment.sh

# -P, and pytest by its own name: from the checkout's folder vLLM would take up triton_kernels as if it were Triton's.
"$PYTHON" -P - <<'END'
import vllm
from vllm.plugins import load_general_plugins

load_general_plugins()
from vllm.model_executor.layers.pooler.seqwise import MeanPool

assert MeanPool.forward.__module__ == "fastpool.integrations.vllm", "vLLM did not load the plugin"
print("vLLM", vllm.__version__, "loaded the plugin by its entry point")
END
exec "$FOLDER/bin/pytest" tests/integrations/vllm
