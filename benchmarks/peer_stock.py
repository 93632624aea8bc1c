"""Stock torchtune: its own ``lora_finetune_single_device``, driven by its own config."""

import logging
import runpy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import OmegaConf
from peer_model import Gradients, Machine, ModelSize, Weights, restore, taken_gradients
from rows import PAD_ID, RowShape, made_up_rows
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets import PackedDataset
from torchtune.modules.peft import get_adapter_params
from torchtune.utils import batch_to_device

from personas_tune.datasets import SharedPrefixDataset, TokenRow

RECIPES = Path(torchtune.__file__).parent.parent / "recipes"  # a package that refuses to be imported
DEFAULTS = OmegaConf.load(RECIPES / "configs" / "phi3" / "mini_lora_single_device.yaml")
WRAPPED = "_checkpoint_wrapped_module."  # in parameter names of checkpointed layers
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class StockSettings:
    """What is tried to make it fast.

    Args:
        batch_size: Rows or packs of one forward pass.
        rows_per_pack: Rows that are packed into one sequence; 0 for none.
        rows_per_item: Rows of a user whose prefix is shared, by our dataset and collate function; 0 for none.
        checkpointing: Recompute activations.
        compile: Compile layers and loss.
    """

    batch_size: int
    rows_per_pack: int = 0
    rows_per_item: int = 0
    checkpointing: bool = False
    compile: bool = False

    def __str__(self) -> str:
        packed = f" packs of {self.rows_per_pack} rows" if self.rows_per_pack else ""
        packed += f" items of {self.rows_per_item} rows" if self.rows_per_item else ""
        checkpointing, compile = ", checkpointing" * self.checkpointing, ", compile" * self.compile
        return f"batch {self.batch_size}{packed}{checkpointing}{compile}"


STOCK_DEFAULTS = StockSettings(
    DEFAULTS.batch_size, checkpointing=DEFAULTS.enable_activation_checkpointing, compile=DEFAULTS.compile
)


class StockTokenizer:
    """All that the recipe and its collate function ask of a tokenizer when rows are tokens already."""

    pad_id = PAD_ID


class StockRows(Dataset[Mapping[str, list[int]]]):
    """Rows as :class:`personas_tune.datasets.RatingDataset` gives them."""

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, list[int]]:
        row = self.rows[index]
        return {"tokens": list(row.tokens), "labels": [CROSS_ENTROPY_IGNORE_IDX] * row.answer_start + row.answer}


def stock_dataset(
    tokenizer: StockTokenizer, *, shape: Mapping[str, Any], packed: bool, max_seq_len: int, rows_per_item: int
) -> Dataset[Any]:
    """The dataset component of the recipe's config.

    Args:
        tokenizer: The recipe's.
        shape: Arguments of :class:`rows.RowShape`.
        packed: Pack rows, by torchtune's own dataset.
        max_seq_len: Tokens of a pack.
        rows_per_item: Rows that share a prefix.
    """
    return _items(made_up_rows(RowShape(**shape)), max_seq_len if packed else 0, rows_per_item)


def _items(rows: Sequence[TokenRow], pack_length: int, rows_per_item: int) -> Dataset[Any]:
    if rows_per_item:
        users = [str(row.tokens[:8]) for row in rows]  # whose made-up prefixes differ from the start
        return SharedPrefixDataset(rows, users, rows_per_item=rows_per_item)
    dataset = StockRows(rows)
    return PackedDataset(dataset, max_seq_len=pack_length, padding_idx=PAD_ID) if pack_length else dataset


class StepClock:
    """A metric logger that only notes when a step is done."""

    def __init__(self, device: str) -> None:
        self._machine = Machine(torch.device(device), torch.float32)
        self.done_at = 0.0

    def log_config(self, config: object) -> None:
        pass

    def log_dict(self, payload: object, step: int) -> None:
        self.done_at = self._machine.clock()

    def close(self) -> None:
        pass


class Stock:
    """The recipe, set up once.

    A step is a training of one step, from the loop's beginning until it logs: what is saved after it doesn't count.
    The recipe trains one adapter; several take several runs, each as long.

    Args:
        size: Of the model.
        weights: Its weights.
        machine: Where it runs.
        shape: Of the rows.
        rows_per_step: Rows of an optimizer step.
        settings: Of the recipe.
        folder: Where :func:`write_base` put the base; the recipe saves there, too.

    Raises:
        ValueError: If a step's rows can't be cut into batches.
    """

    def __init__(
        self,
        size: ModelSize,
        weights: Weights,
        machine: Machine,
        shape: RowShape,
        rows_per_step: int,
        *,
        settings: StockSettings,
        folder: Path,
    ) -> None:
        rows_per_batch = settings.batch_size * (settings.rows_per_pack or settings.rows_per_item or 1)
        if rows_per_step % rows_per_batch:
            raise ValueError(f"a step of {rows_per_step} rows can't be cut into {settings}")
        longest = max(len(row.tokens) for row in made_up_rows(shape))
        self.pack_length = -(-longest * settings.rows_per_pack // 128) * 128  # FlexAttention works on blocks of 128
        self.machine, self.weights, self.settings = machine, weights, settings
        changes = {
            "output_dir": str(folder / "out"),
            "model": {"_component_": "torchtune.models.phi3.lora_phi3", **size.lora_arguments()},
            "tokenizer": {"_component_": "peer_stock.StockTokenizer"},
            "checkpointer": _checkpointer(folder),
            "dataset": {
                "_component_": "peer_stock.stock_dataset",
                "shape": asdict(shape),
                "packed": settings.rows_per_pack > 0,
                "max_seq_len": self.pack_length,
                "rows_per_item": settings.rows_per_item,
            },
            **({"collate_fn": "personas_tune.datasets.collate_shared_prefixes"} if settings.rows_per_item else {}),
            "metric_logger": {"_component_": "peer_stock.StepClock", "device": machine.device.type},
            "seed": 0,
            "epochs": 1,
            "max_steps_per_epoch": 1,
            "batch_size": settings.batch_size,
            "gradient_accumulation_steps": rows_per_step // rows_per_batch,
            "compile": settings.compile,
            "enable_activation_checkpointing": settings.checkpointing,
            "save_adapter_weights_only": True,  # on a CPU it would else add the adapter to the base
            "device": machine.device.type,
            "dtype": DTYPES[machine.dtype],
        }
        config = OmegaConf.create({**OmegaConf.to_container(DEFAULTS, resolve=False), **changes})
        with _quiet():
            self.recipe = _recipe_class()(config)
            self.recipe.setup(cfg=config)
        parameters = get_adapter_params(self.recipe._model)
        self.adapter = {name.replace(WRAPPED, ""): weight for name, weight in parameters.items()}
        restore(self.adapter, weights)

    def gradients(self, rows: Sequence[TokenRow]) -> tuple[float, Gradients]:
        """By the recipe's own collate function and loss step."""
        restore(self.adapter, self.weights)
        with _quiet():
            dataset: Any = _items(rows, self.pack_length, self.settings.rows_per_item)
        items, size = [dataset[index] for index in range(len(dataset))], self.settings.batch_size
        n_tokens = sum(len(row.answer) for row in rows)
        total = 0.0
        for start in range(0, len(items), size):
            batch = self.recipe._dataloader.collate_fn(items[start : start + size])
            batch_to_device(batch, self.machine.device)
            n_labels = (batch["labels"] != CROSS_ENTROPY_IGNORE_IDX).sum()
            loss = self.recipe._loss_step(batch) * n_labels / n_tokens
            loss.backward()
            total += loss.item()
        return total, taken_gradients(self.adapter)

    def step(self) -> float:
        self.recipe.epochs_run = 0
        with _quiet():
            start = self.machine.clock()
            self.recipe.train()
        return float(self.recipe._metric_logger.done_at - start)


def write_base(weights: Weights, folder: Path) -> None:
    """The base's weights, for the recipe's checkpointer."""
    (folder / "base").mkdir()
    torch.save(weights.base, folder / "base" / "model.pt")


def _checkpointer(folder: Path) -> dict[str, Any]:
    return {
        "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
        "checkpoint_dir": str(folder / "base"),
        "checkpoint_files": ["model.pt"],
        "model_type": "PHI3_MINI",
        "output_dir": str(folder / "out"),
    }


@cache
def _recipe_class() -> Any:
    module = runpy.run_path(str(RECIPES / "lora_finetune_single_device.py"), run_name="stock")
    return module["LoRAFinetuneRecipeSingleDevice"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the recipe's progress bars and log."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
