import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from personas_tune.config import load_experiment
from personas_tune.workspace import Workspace

GENRES = ("War", "Romance", "Comedy")
SUMMARIES = (
    "soldiers cross a frozen river at night",
    "two painters write letters from the coast",
    "a clumsy waiter wrecks a grand wedding",
)
N_USERS, N_TRAIN, N_TEST, N_ITEMS = 6, 8, 4, 30


class Experiment:
    """The tables that persona_raft reads, small and seeded, to be changed before they are written."""

    def __init__(self, root):
        self.workspace = Workspace.at(root / "run")
        self.config = root / "experiment.yaml"
        self.config.write_text(f"output_dir: {self.workspace.root}\n")
        draws = np.random.default_rng(0)
        self.items = [self._item(number) for number in range(N_ITEMS)]
        self.interactions, self.memories, self.profiles, self.personas = [], [], [], []
        for user in range(N_USERS):
            user_id = f"u{user}"
            self.personas.append({"user_id": user_id, "persona": user % 2, "distance": 0.5})
            for upto in (4, N_TRAIN):
                text = f"I like {GENRES[user % 3]} after {upto} films"
                self.profiles.append(
                    {"user_id": user_id, "upto_position": upto, "profile": text, "distiller": "file", "n_words": 6}
                )
            for position, number in enumerate(draws.permutation(N_ITEMS)[: N_TRAIN + N_TEST]):
                self._add_interaction(user_id, int(number), position, float(draws.integers(1, 6)))

    def _item(self, number):
        return {
            "item_id": f"i{number:02}",
            "title": f"Film {number % 7} of {number % 4}",
            "year": 1980 + number % 5 if number % 3 else None,
            "genres": [GENRES[number % 3]],
            "summary": SUMMARIES[number % 3] if number % 4 else None,
            "cast": ["Ann Lee", "Bo Kim"][: number % 3],
            "mean_rating": 3.5,
            "n_ratings": 9,
        }

    def _add_interaction(self, user_id, number, position, rating):
        row = {"user_id": user_id, "item_id": f"i{number:02}", "rating": rating, "position": position}
        is_train = position < N_TRAIN
        self.interactions.append({**row, "timestamp": 1000 + position, "split": "train" if is_train else "test"})
        if is_train:
            self.memories.append({**row, "memory": f"{GENRES[number % 3]} suits me, I gave it {rating:g}"})

    @property
    def test_only_items(self):
        in_train = {row["item_id"] for row in self.interactions if row["split"] == "train"}
        return [item for item in self.items if item["item_id"] not in in_train]

    def write(self):
        workspace = self.workspace
        self._write(workspace.interactions, self.interactions, {"rating": pa.float64(), "position": pa.int32()})
        self._write(workspace.items, self.items, {"year": pa.int32(), "summary": pa.string()})
        memory_types = {"user_id": pa.string(), "item_id": pa.string(), "memory": pa.string(), "position": pa.int32()}
        self._write(workspace.memories, self.memories, {**memory_types, "rating": pa.float64()})
        self._write(workspace.profiles, self.profiles, {"upto_position": pa.int32()})
        self._write(workspace.personas, self.personas, {"persona": pa.int32()})
        return self

    def _write(self, path, rows, types):
        path.parent.mkdir(parents=True, exist_ok=True)
        names = rows[0] if rows else types
        columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in names}
        pq.write_table(pa.table(columns), path)

    def run(self, recipe, *overrides):
        recipe.recipe_main.__wrapped__(load_experiment(str(self.config), list(overrides)))
        return self

    def samples(self, split):
        return pq.read_table(self.workspace.root / "samples" / f"{split}.parquet").to_pylist()

    def files(self, stage):
        """The stage's outputs as bytes by name."""
        folder = self.workspace.root / stage
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def make_experiment(tmp_path):
    """Makes one unwritten experiment for each name it is given."""

    def make(name="one"):
        (tmp_path / name).mkdir()
        return Experiment(tmp_path / name)

    return make
