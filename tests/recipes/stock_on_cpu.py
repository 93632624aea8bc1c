"""One of torchtune's distributed recipes without a GPU.

    STOCK_RECIPE=NAME tune run --nproc_per_node 2 stock_on_cpu --config ...

The recipes ask for NCCL, for CUDA's memory statistics and for an empty CUDA cache; nothing else is changed.
"""

import os
import runpy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed
import torchtune

RECIPES = Path(torchtune.__file__).parent.parent / "recipes"


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """Recipes that are loaded and run within need none."""
    join = torch.distributed.init_process_group
    changes: dict[str, Any] = {
        "torch.distributed.init_process_group": lambda backend: join("gloo"),
        "torchtune.training.get_memory_stats": lambda device: {},
        "torchtune.training.log_memory_stats": lambda statistics, **more: None,
        "torchtune.training.cleanup_before_training": lambda: None,
    }
    with ExitStack() as patches:
        for name, replacement in changes.items():
            patches.enter_context(patch(name, replacement))
        yield


if __name__ == "__main__":
    with without_a_gpu():
        runpy.run_path(str(RECIPES / f"{os.environ['STOCK_RECIPE']}.py"), run_name="__main__")
