"""Registration of "santa" with Transformers, with and without an explicit import.

`install()` registers at once if Transformers' model code is loaded, and otherwise leaves a one-shot
import hook that registers right after it loads. The entry point `santa_hf` in the group
`torch.backends` calls `autoload`, so that importing torch is enough: command-line tools can pass
`attn_implementation=santa` without knowing this package. Nothing here imports torch or Transformers.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from types import ModuleType

__all__ = ["autoload", "install", "register"]

_TARGET = "transformers.modeling_utils"
_NAME = "santa"


def autoload() -> None:
    """Entry point of the group `torch.backends`; SANTA_HF_AUTOLOAD=0 turns it off.

    Importing this package has already installed the hook, and an exception here would make
    `import torch` fail, so there is nothing left to do.
    """


def install() -> None:
    """Register now or as soon as Transformers' model code is imported; may be called again."""
    if _loaded():
        _register_or_warn()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def register() -> None:
    """Register the attention and mask functions under "santa", and what goes with them.

    May be called again.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from .attention import santa_attention
    from .cache import use_santa_layers
    from .given import check_given
    from .masks import santa_mask
    from .mla import adopt_at_load
    from .paged import PAGED, allow_continuous_batching, santa_paged_attention, santa_paged_mask
    from .prefill import mark_prefill

    AttentionInterface.register(_NAME, santa_attention)
    AttentionMaskInterface.register(_NAME, santa_mask)
    AttentionInterface.register(PAGED, santa_paged_attention)
    AttentionMaskInterface.register(PAGED, santa_paged_mask)
    use_santa_layers()
    adopt_at_load()
    mark_prefill()
    check_given()
    allow_continuous_batching()


def _register_or_warn() -> None:
    try:
        register()
    except Exception as error:  # noqa: BLE001 - a broken plugin must not break `import transformers`
        warnings.warn(f"santa_hf could not register with Transformers: {error}", stacklevel=2)


def _loaded() -> bool:
    """Whether Transformers' model code has been imported, and has run to its end."""
    module = sys.modules.get(_TARGET)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _Hook(importlib.abc.MetaPathFinder):
    """Finds `transformers.modeling_utils` once, and registers after it has run.

    If that module is what imports torch, and so this package, it is past finding: then the first
    model file that is imported after it is the sign that it has run.
    """

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        late = fullname.startswith("transformers.models.") and _loaded()
        if fullname != _TARGET and not late:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if late:
            _register_or_warn()
        # The other finders, asked afresh: the caller walks the list that has just become shorter.
        spec = importlib.util.find_spec(fullname)
        if not late and spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


class _RegisterAfter(importlib.abc.Loader):
    """Runs a module with its own loader, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader, as if it had never been found by the hook.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register_or_warn()


def enabled() -> bool:
    """Whether the package may register by itself (SANTA_HF_AUTOLOAD is not 0)."""
    return os.environ.get("SANTA_HF_AUTOLOAD", "1") != "0"
