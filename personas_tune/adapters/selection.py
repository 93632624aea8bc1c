"""Which adapter answers for a user: the trained sets on disk."""

from collections.abc import Collection
from pathlib import Path

from personas_tune.adapters.bank import AdapterBank
from personas_tune.adapters.files import NATIVE_FILE, load_native
from personas_tune.errors import AdapterError
from personas_tune.workspace import read_table


def load_adapter_set(bank: AdapterBank, folder: Path, prefix: str, user_ids: Collection[str] = ()) -> dict[str, str]:
    """Load a set's adapters into a bank.

    Args:
        bank: Of the base that the set was trained on.
        folder: ``adapters/<set>``.
        prefix: Put before each adapter's name in the bank.
        user_ids: Users who must have an adapter.

    Returns:
        Each user's adapter, by its name in the bank.

    Raises:
        MissingInputError: If the set hasn't been trained.
        AdapterError: If an adapter doesn't fit the base, or a user has none.
        CheckpointError: If a file is damaged.
    """
    rows = read_table(folder / "assignment.parquet", ("user_id", "adapter")).to_pylist()
    assignment = {row["user_id"]: f"{prefix}/{row['adapter']}" for row in rows}
    without = sorted(set(user_ids) - assignment.keys())
    if without:
        raise AdapterError(
            f"no adapter for user {without[0]} ({len(without)} such users)",
            where=str(folder),
            remedy="run `tune run persona_lora --config ...` again",
        )
    for name in sorted({row["adapter"] for row in rows}):
        bank.add_loaded(f"{prefix}/{name}", load_native(folder / name), where=str(folder / name / NATIVE_FILE))
    return assignment
