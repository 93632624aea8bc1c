"""Turn a recommender's log into the tables that all later stages read.

Reads  data.path, and where they are set data.item_metadata and data.cohort.exclude
Writes data/interactions.parquet, data/items.parquet, data/users.parquet, data/outside.parquet,
       and data/oracle.parquet for a synthetic world

    tune run persona_prepare --config phi3_persona.yaml data.path=ml-1m
"""

from omegaconf import DictConfig

from personas_tune import config
from personas_tune.config import settings_of
from personas_tune.interactions.catalogue import join_metadata, place_items
from personas_tune.interactions.checking import build_log
from personas_tune.interactions.log import drop_users
from personas_tune.interactions.prepare import Prepared, prepare
from personas_tune.interactions.sources import find_file, find_log, read_item_metadata, read_log, read_own_items
from personas_tune.interactions.world import generate_world
from personas_tune.interactions.world_log import WHERE, select_oracle, take_world_items, take_world_log
from personas_tune.workspace import Workspace, open_stage, read_table


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Turn a recommender's log into the tables that all later stages read."""
    data = cfg.data
    workspace = Workspace.at(cfg.output_dir)
    files = None if data.format == "world" else find_log(data.format, data.path)
    metadata = find_file(data.item_metadata, "data.item_metadata")
    exclude = find_file(data.cohort.exclude, "data.cohort.exclude")
    inputs = [*(files.paths if files else []), *(path for path in (metadata, exclude) if path)]
    with open_stage(workspace.root / "data", settings_of(cfg, "data"), inputs, seed=cfg.seed) as stage:
        if stage.is_current:
            print(f"data: up to date in {stage.folder}")
            return
        if files is None:
            world = generate_world(**data.world)
            raw, own_items = take_world_log(world.interactions), take_world_items(world.items)
        else:
            raw = read_log(files, data.columns, data.encoding)
            own_items = read_own_items(files, data.encoding)
        log = build_log(
            raw,
            rating_min=data.rating_scale.min,
            rating_max=data.rating_scale.max,
            rating_step=data.rating_scale.step,
            timestamp_unit=data.timestamp_unit,
            duplicates=data.duplicates,
        )
        if exclude:
            log = drop_users(log, read_table(exclude, ["user_id"])["user_id"].to_pylist(), str(exclude))
        item_ids = log.item_ids.to_pylist()
        catalogue = place_items(item_ids, own_items, str(files.items) if files else WHERE)
        if metadata:
            rows = read_item_metadata(metadata, data.encoding)
            catalogue, counts = join_metadata(item_ids, catalogue, rows, str(metadata))
            print(f"{metadata}: {counts}")
        prepared = prepare(
            log,
            catalogue,
            n_users=data.cohort.n_users,
            min_interactions=data.cohort.min_interactions,
            max_interactions=data.cohort.max_interactions,
            split_by=data.split.by,
            train_fraction=data.split.train_fraction,
            test_rows=data.split.test_rows,
            traits=data.traits,
            historical_average=data.historical_average,
            seed=cfg.seed,
        )
        for name in ("interactions", "items", "users", "outside"):
            stage.write_table(f"{name}.parquet", getattr(prepared, name))
        if files is None:
            stage.write_table("oracle.parquet", select_oracle(world.oracle, prepared.interactions))
    print_summary(prepared, data.historical_average)
    print(f"data: written to {stage.folder}")


def print_summary(prepared: Prepared, historical_average: str) -> None:
    """Print the tables' sizes, how many items have an average, and where the tiers of the traits begin."""
    n_train = sum(prepared.users["n_train"].to_pylist())
    n_test = sum(prepared.users["n_test"].to_pylist())
    left_out = f" ({prepared.n_left_out} left out by the time cut)" if prepared.n_left_out else ""
    print(
        f"cohort: {prepared.users.num_rows} users{left_out}, {n_train} train and {n_test} test interactions, "
        f"{prepared.items.num_rows} items; outside it {prepared.outside.num_rows} interactions"
    )
    n_averages = prepared.items.num_rows - prepared.items["mean_rating"].null_count
    nobody = "; nobody is outside the cohort: set data.cohort.n_users, or data.historical_average=train"
    is_empty = historical_average == "outside" and not prepared.outside.num_rows
    print(f"averages ({historical_average}): of {n_averages} items{nobody if is_empty else ''}")
    starts = []
    for name in ("activity", "conformity", "diversity"):
        low, high = getattr(prepared.traits, name).thresholds
        starts.append(f"{name} {low:.6g}, {high:.6g}" if low < float("inf") else f"{name} unknown, for want of genres")
    print(f"tiers 2 and 3 begin at: {'; '.join(starts)}")


if __name__ == "__main__":
    recipe_main()
