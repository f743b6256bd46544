"""santa_hf: sampled decode attention for Transformers, `attn_implementation="santa"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .integration import registry as _registry
from .stats import count_value_rows, reset_stats, stats

if TYPE_CHECKING:
    from .config import SantaConfig
    from .functional import santa_decode
    from .integration.configure import configure
    from .integration.registry import register
    from .integration.stopping import deferred_stopping

__all__ = [
    "SantaConfig",
    "configure",
    "count_value_rows",
    "deferred_stopping",
    "register",
    "reset_stats",
    "santa_decode",
    "stats",
]

__version__ = "0.1.0"

# Resolved at first use (PEP 562): `import torch` runs this file through an entry point.
_LAZY = {
    "SantaConfig": ".config",
    "configure": ".integration.configure",
    "deferred_stopping": ".integration.stopping",
    "register": ".integration.registry",
    "santa_decode": ".functional",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if _registry.enabled():
    _registry.install()
