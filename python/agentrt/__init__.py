"""agentrt: a runtime layer between agent frameworks and LLM serving engines."""

import warnings as _warnings

from agentrt._core import build_info, is_debug_build

__all__ = ["build_info"]
__version__ = "0.1.0"

if is_debug_build():
    _warnings.warn(
        "agentrt was built without optimisation and is 10-50x slower; rebuild with `maturin develop --release`",
        RuntimeWarning,
        stacklevel=2,
    )
