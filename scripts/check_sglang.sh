#!/bin/sh
# Runs tests/integrations/test_sglang.py on SGLang's own modules, with a CPU build of torch; no GPU is needed.
#
#   scripts/check_sglang.sh [FOLDER]    an environment there (3 GB, some minutes; kept and used again), by default
#                                       ${TMPDIR:-/tmp}/fastpool-sglang
#
# SGLANG and TORCH name other releases. SGLang goes in without its requirements, some 70, most of them for CUDA
# (sglang-kernel, FlashInfer); then those that its pooler and its plugin loader import, in the versions that SGLang asks
# for. No module is a stand-in. One file is emptied: torchvision's descriptions of its compiled operators, which raise
# where those are a CUDA build's and cannot be loaded; SGLang imports torchvision for image models, nothing here calls it.
set -eu
cd "$(dirname "$0")/.."

FOLDER=${1:-${TMPDIR:-/tmp}/fastpool-sglang}

install_engine() {
    "$PYTHON" -m pip download -q --no-deps -d "$FOLDER/wheel" "${SGLANG:-sglang==0.5.23}"
    "$PYTHON" - "$FOLDER"/wheel/*.whl >"$FOLDER/requirements.txt" <<'END'
import re
import sys
from importlib.metadata import distributions

imported = (
    "IPython aiohttp apache-tvm-ffi compressed-tensors fastapi gguf msgspec orjson psutil pybase64 pyzmq requests "
    "sentencepiece tokenizers torchvision transformers"
)
(sglang,) = distributions(path=sys.argv[1:])
for line in sglang.requires:
    if re.match(r"[\w.-]+", line)[0] in imported.split() and "extra ==" not in line:
        print(line)
END
    # torch's CPU build comes without Triton; dill is imported and not asked for.
    "$PYTHON" -m pip install -q "$TORCH" triton dill -r "$FOLDER/requirements.txt"
    "$PYTHON" -m pip install -q --no-deps "$FOLDER"/wheel/*.whl
    : >"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/_meta_registrations.py"
}

. scripts/engine_environment.sh

# -P, and pytest by its own name: from the checkout's folder SGLang could take up triton_kernels as if it were Triton's.
# The registry wraps what it is given in SGLang's name, so the plugin is told by what it computes: in float16 the
# running sum of SGLang's own mean overflows here.
"$PYTHON" -P -W ignore - <<'END'
from types import SimpleNamespace

import sglang
import torch
from sglang.srt.layers import pooler
from sglang.srt.plugins import load_plugins


def means():
    lengths = torch.tensor([2, 2])
    batch = SimpleNamespace(extend_seq_lens=lengths, extend_seq_lens_cpu=lengths.tolist(), dimensions=None)
    hidden = torch.full((4, 1), 40000.0, dtype=torch.float16)
    return pooler.pool_hidden_states(pooler.PoolingType.MEAN, hidden, batch).flatten().tolist()


assert means() != [40000.0, 40000.0], "SGLang's own mean no longer overflows"
load_plugins()
assert means() == [40000.0, 40000.0], "SGLang did not load the plugin"
print("SGLang", sglang.__version__, "loaded the plugin by its entry point")
END
exec "$FOLDER/bin/pytest" tests/integrations/test_sglang.py
