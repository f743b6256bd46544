"""Registration with Transformers, in processes of their own: in any order of imports, or switched off.

The package is installed in the environment that runs the tests, so `import torch` finds its entry point.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny

# Generates with a plain string and checks that it sampled; `{model}` is a saved model.
_GENERATE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({model!r}, attn_implementation="santa")
model.generate(torch.arange(3, 80)[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
import santa_hf
assert santa_hf.stats(model).total.sampled == 6, santa_hf.stats(model)
assert santa_hf.stats(model).total.samples == 6 * 5 * 4, santa_hf.stats(model)
"""

_LOADED_BY_TORCH = """
import sys
import torch
assert "santa_hf" in sys.modules, "the entry point did not run"
for name in ("transformers", "triton", "yaml"):
    assert name not in sys.modules, name
"""


@dataclass
class Scenario:
    """A script, which may name the saved model as {model}, and what its environment holds."""

    script: str
    environment: dict[str, str] = field(default_factory=dict)


SCENARIOS = {
    "torch first": Scenario(_LOADED_BY_TORCH + _GENERATE),
    # torch is imported while the module that the hook waits for is already running.
    "model code first": Scenario("import transformers.modeling_utils\n" + _GENERATE),
    "transformers first": Scenario("import transformers\n" + _GENERATE),
    "explicitly first": Scenario(
        """
import santa_hf, sys
assert "transformers" not in sys.modules
import torch, transformers
santa_hf.register()
santa_hf.register()
"""
        + _GENERATE,
    ),
    "explicitly last": Scenario(
        """
import torch
from transformers import AutoModelForCausalLM, AttentionInterface
assert "santa" not in AttentionInterface().valid_keys()
import santa_hf
"""
        + _GENERATE,
        {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    ),
    "switched off": Scenario(
        """
import sys, torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
try:
    AutoModelForCausalLM.from_pretrained({model!r}, attn_implementation="santa")
except (ValueError, ImportError) as error:
    assert "santa" in str(error), error
else:
    raise AssertionError("santa was registered")

def state():
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2, attn_implementation="sdpa"))
    return (
        dict(ALL_ATTENTION_FUNCTIONS.items()),
        dict(ALL_MASK_ATTENTION_FUNCTIONS.items()),
        [type(layer) for layer in cache.layers],
        [type(finder) for finder in sys.meta_path],
    )

before = state()
assert "santa" not in before[0] and "santa" not in before[1]
import santa_hf
assert state() == before
santa_hf.register()
after = state()
for name in ("santa", "santa_paged"):
    assert after[0].pop(name) and after[1].pop(name)
assert after == before, "registration changed what others use"
"""
        + _GENERATE,
        {"SANTA_HF_AUTOLOAD": "0"},
    ),
    "broken": Scenario(
        """
import sys, warnings
sys.modules["santa_hf.integration.attention"] = None  # importing it raises
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.modeling_utils
messages = [str(w.message) for w in caught if "santa_hf could not register" in str(w.message)]
assert len(messages) == 1, caught
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({model!r})
model.generate(torch.arange(3, 80)[None], max_new_tokens=3, do_sample=False)
"""
    ),
    "import time": Scenario(
        """
import sys, time, torch
assert "santa_hf" not in sys.modules and "transformers" not in sys.modules
seconds = []
for _ in range(5):
    for name in [name for name in sys.modules if name.split(".")[0] == "santa_hf"]:
        del sys.modules[name]
    start = time.perf_counter()
    import santa_hf
    seconds.append(time.perf_counter() - start)
    assert "transformers" not in sys.modules and "triton" not in sys.modules
assert min(seconds) < 0.05, seconds
""",
        {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    ),
}


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], subprocess.CompletedProcess]]:
    """Runs a scenario; all are started at once, two at a time, since importing is most of the work."""
    directory = tmp_path_factory.mktemp("registration")
    (directory / "five.yaml").write_text("samples: 5\n")
    tiny.build("llama").save_pretrained(directory / "model")

    def start(scenario: Scenario) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "SANTA_HF_CONFIG": str(directory / "five.yaml"),
            "OMP_NUM_THREADS": "1",
            **scenario.environment,
        }
        script = scenario.script.replace("{model!r}", repr(str(directory / "model")))
        return subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future] = {}
        for name, scenario in SCENARIOS.items():
            futures[name] = pool.submit(start, scenario)
        yield lambda name: futures[name].result()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_registration(scenario: str, run: Callable[[str], subprocess.CompletedProcess]) -> None:
    process = run(scenario)
    assert process.returncode == 0, process.stderr
    if scenario != "broken":
        assert "could not register" not in process.stderr


def test_the_hook_leaves_no_trace() -> None:
    """The module it waited for has its own loader, and the hook is gone."""
    import transformers.modeling_utils as target

    assert type(target.__loader__).__module__ == "_frozen_importlib_external"
    assert target.__spec__.loader is target.__loader__
    assert not [f for f in sys.meta_path if type(f).__module__.startswith("santa_hf")]
    assert Path(target.__spec__.origin).name == "modeling_utils.py"
