"""What tests share: a tiny finished experiment, and the config sections of a tiny base."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from personas_tune.workspace import Workspace

LABELS = ["1", "2", "3", "4", "5"]
N_USERS, N_ITEMS, N_TRAIN, N_TEST = 6, 12, 6, 3
WORDS = (
    "river", "comet", "garden", "engine", "violin", "harbor", "lantern", "meadow", "anchor", "falcon", "copper",
    "winter",
)  # fmt: skip
TINY = {
    "vocab_size": 400, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32,
    "intermediate_dim": 64, "max_seq_len": 1024,
}  # fmt: skip


def write_experiment(root: Path, labels: list[str] | None = None) -> Workspace:
    """Write data/, memory/ and samples/ of a made-up experiment straight to disk."""
    labels = labels or LABELS
    rng = np.random.default_rng(0)
    workspace = Workspace.at(root)
    for folder in ("data", "memory", "samples"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    items = [
        {
            "item_id": f"i{n}", "title": f"The {WORDS[n].title()}", "year": 1980 + n,
            "genres": ["Drama", "War"][: 1 + n % 2],
            "summary": f"A story about a {WORDS[n]} and a {WORDS[-n]}.", "cast": ["Ann Lee", "Bo Fox"][: n % 3],
            "mean_rating": 3.0 + n / 10 if n else None, "n_ratings": n,
        }
        for n in range(N_ITEMS)
    ]  # fmt: skip
    rows, users = [], []
    for u in range(N_USERS):
        chosen = rng.permutation(N_ITEMS)[: N_TRAIN + N_TEST]
        for position, item in enumerate(chosen):
            rows.append(
                {
                    "user_id": f"u{u}", "item_id": f"i{item}", "position": position,
                    "rating": float(labels[int(rng.integers(len(labels)))]), "persona": u % 2,
                    "memory_positions": [0] if position else [],
                }
            )  # fmt: skip
        users.append(
            {
                "user_id": f"u{u}", "n_train": N_TRAIN, "n_test": N_TEST, "mean_rating": 3.5,
                "activity": 9.0, "activity_tier": 1 + u % 3, "conformity": 1.0, "conformity_tier": 2,
                "diversity": 2.0, "diversity_tier": 3,
            }
        )  # fmt: skip
    train = [row for row in rows if row["position"] < N_TRAIN]
    test = [row for row in rows if row["position"] >= N_TRAIN]
    memories = [
        {
            **{k: row[k] for k in ("user_id", "item_id", "position", "rating")},
            "memory": f"I gave {row['item_id']} {row['rating']:g}.",
        }
        for row in train
    ]
    profiles = [
        {
            "user_id": f"u{u}", "upto_position": upto, "distiller": "template", "n_words": 9,
            "profile": f"I like the {WORDS[u]}. I have seen {upto} films.",
        }
        for u in range(N_USERS)
        for upto in (0, N_TRAIN)
    ]  # fmt: skip
    types = {"persona": pa.int32(), "position": pa.int32(), "memory_positions": pa.list_(pa.int32())}
    _write(workspace.items, items, {"year": pa.int32(), "genres": pa.list_(pa.string()), "cast": pa.list_(pa.string())})
    _write(workspace.users, users, {})
    _write(workspace.memories, memories, {})
    _write(workspace.profiles, profiles, {})
    _write(workspace.train_samples, train, types)
    _write(workspace.test_samples, test, types)
    settings = {"template": "movies", "profile": "final", "labels": labels}
    workspace.prompt_settings.write_text(json.dumps(settings), encoding="utf-8")
    return workspace


def _write(path: Path, rows: list[dict[str, Any]], types: dict[str, pa.DataType]) -> None:
    columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), path)


def base_sections(checkpoint: Path, **model: Any) -> dict[str, dict[str, Any]]:
    """Config sections that load ``tiny_checkpoint`` with LoRA on q and k."""
    lora = {
        "lora_attn_modules": ["q_proj", "k_proj"], "apply_lora_to_mlp": False, "apply_lora_to_output": False,
        "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0,
    }  # fmt: skip
    return {
        "model": {"_component_": "torchtune.models.phi3.lora_phi3", **TINY, **lora, **model},
        "tokenizer": {
            "_component_": "torchtune.models.phi3.phi3_mini_tokenizer",
            "path": str(checkpoint / "tokenizer.model"),
            "special_tokens_path": str(checkpoint / "special_tokens.json"),
            "max_seq_len": 1024,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(checkpoint),
            "checkpoint_files": ["model.safetensors"],
            "model_type": "PHI3_MINI",
            "output_dir": str(checkpoint.parent / "unused"),
        },
    }
