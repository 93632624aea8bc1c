"""Which adapter answers for a user: the trained sets on disk."""

from collections.abc import Collection, Mapping
from pathlib import Path

from personas_tune.adapters.bank import AdapterBank
from personas_tune.adapters.files import NATIVE_FILE, load_native
from personas_tune.errors import AdapterError
from personas_tune.workspace import Stage, read_table


def write_assignment(stage: Stage, assignment: Mapping[str, str]) -> None:
    """Write each user's adapter, by its name within the set, where :func:`read_assignment` finds it."""
    import pyarrow as pa

    table = pa.table({"user_id": list(assignment), "adapter": list(assignment.values())})
    stage.write_table("assignment.parquet", table)


def read_assignment(folder: Path, prefix: str, user_ids: Collection[str] = ()) -> dict[str, str]:
    """Each user's adapter as ``PREFIX/ADAPTER``, from ``adapters/<set>``; arguments as for :func:`load_adapter_set`.

    Raises:
        MissingInputError: If the set hasn't been trained.
        AdapterError: If a user has no adapter.
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
    return assignment


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
    assignment = read_assignment(folder, prefix, user_ids)
    for name in sorted(set(assignment.values())):
        adapter = folder / name.removeprefix(f"{prefix}/")
        bank.add_loaded(name, load_native(adapter), where=str(adapter / NATIVE_FILE))
    return assignment
