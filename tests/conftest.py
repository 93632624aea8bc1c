"""A tiny finished experiment and a tiny random Phi-3 checkpoint, shared by all tests."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from openai_server import Server, start_server
from tiny import TINY, base_sections, write_experiment

from personas_tune.workspace import Workspace

# A shell has what it runs in the background ignore SIGINT, and children take that over; some tests send one.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure of ours.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")


@pytest.fixture
def experiment(tmp_path: Path) -> Workspace:
    return write_experiment(tmp_path / "run")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3-architecture checkpoint in Hugging Face format, with a tokenizer of its own."""
    from personas_tune.datasets import RatingSource
    from personas_tune.prompts.render import render_prompt
    from personas_tune.training.tiny_base import TinyBaseShape, build_tiny_base
    from personas_tune.training.tiny_checkpoint import save_tiny_base
    from personas_tune.training.tiny_tokenizers import train_tokenizer

    folder = tmp_path_factory.mktemp("base")
    workspace = write_experiment(tmp_path_factory.mktemp("texts"))
    source = RatingSource(workspace.root)
    prompts = [render_prompt(source.template, source.parts(sample, "both")) for sample in source.samples("train")]
    tokenizer = train_tokenizer([m["content"] for prompt in prompts for m in prompt], TINY["vocab_size"], folder)
    shape = TinyBaseShape(**TINY)
    save_tiny_base(build_tiny_base(shape, seed=1), shape, tokenizer.special_tokens, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train tokenizers in the files of real ones, each once; kinds as in ``published.Published``."""
    from published import write_tokenizer

    return cache(lambda kind: write_tokenizer(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture
def load_tiny(tiny_checkpoint: Path) -> Callable[..., Any]:
    """Load the tiny base; keyword arguments go into its ``model`` section."""
    from personas_tune.adapters.base_model import load_base

    return lambda **model: load_base(**base_sections(tiny_checkpoint, **model), device="cpu", dtype="fp32")


@pytest.fixture
def openai_server() -> Iterator[Callable[..., Server]]:
    """Start servers that speak the OpenAI API; keyword arguments are options of ``loopback/options.py``."""
    with ExitStack() as servers:
        yield lambda **options: servers.enter_context(start_server(**options))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Oversubscribed threads are many times slower on small machines."""
    import torch

    torch.set_num_threads(1)
