# For check_vllm.sh and check_sglang.sh, which read it once FOLDER and install_engine are there.

TORCH=${TORCH:-torch==2.13.0}
PYTHON="$FOLDER/bin/python"

if ! [ -e "$FOLDER/ready" ]; then
    "${BASE_PYTHON:-python3}" -m venv "$FOLDER"
    "$PYTHON" -m pip install -q "$TORCH" "setuptools>=77" cmake ninja pybind11 pytest
    install_engine
    touch "$FOLDER/ready"
fi

# From a copy, built anew each time: an install from the checkout itself would take up what other builds have left there.
rm -rf "$FOLDER/sources"
mkdir "$FOLDER/sources"
cp -r setup.py pyproject.toml CMakeLists.txt MANIFEST.in README.md LICENSE csrc python triton_kernels "$FOLDER/sources"
FASTPOOL_CUDA=0 FASTPOOL_NATIVE=1 "$PYTHON" -m pip install -q --no-build-isolation --no-deps --force-reinstall \
    "$FOLDER/sources"
