"""Which adapter answers for a user: the trained sets on disk."""

from pathlib import Path

from personas_tune.adapters.bank import AdapterBank
from personas_tune.adapters.files import NATIVE_FILE, load_native
from personas_tune.workspace import read_table


def load_adapter_set(bank: AdapterBank, folder: Path, prefix: str) -> dict[str, str]:
    """Load a set's adapters into a bank.

    Args:
        bank: Of the base that the set was trained on.
        folder: ``adapters/<set>``.
        prefix: Put before each adapter's name in the bank.

    Returns:
        Each user's adapter, by its name in the bank.

    Raises:
        MissingInputError: If the set hasn't been trained.
        AdapterError: If an adapter doesn't fit the base.
        CheckpointError: If a file is damaged.
    """
    rows = read_table(folder / "assignment.parquet", ("user_id", "adapter")).to_pylist()
    assignment = {row["user_id"]: f"{prefix}/{row['adapter']}" for row in rows}
    for name in sorted({row["adapter"] for row in rows}):
        bank.add_loaded(f"{prefix}/{name}", load_native(folder / name), where=str(folder / name / NATIVE_FILE))
    return assignment
