import json
import os
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from personas_tune import config
from personas_tune.config import (
    base_sections,
    bundled_configs,
    bundled_path,
    check_components,
    find_config,
    instantiate,
    load_experiment,
    settings_of,
    without_secrets,
)
from personas_tune.errors import ConfigError, PersonasTuneError
from personas_tune.schema import Experiment
from personas_tune.training.fit import TrainingSettings
from personas_tune.workspace import open_stage

MINIMAL = "output_dir: run\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a YAML's text with overrides."""
    monkeypatch.chdir(tmp_path)

    def load_text(text=MINIMAL, *overrides):
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return load_experiment("c.yaml", overrides)

    return load_text


@pytest.fixture
def mistakes(load):
    """The lines that loading a YAML's text with overrides is refused with."""

    def lines_of(text=MINIMAL, *overrides):
        with pytest.raises(PersonasTuneError) as caught:
            load(text, *overrides)
        return caught.value.lines

    return lines_of


# Which file


def test_a_file_of_that_name_comes_before_the_bundled_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = find_config("quickstart.yaml")
    assert bundled.read_text(encoding="utf-8").startswith("# The embedded default")
    Path("quickstart.yaml").write_text(MINIMAL, encoding="utf-8")
    assert find_config("quickstart.yaml") == Path("quickstart.yaml")
    assert find_config("quickstart") == bundled  # the suffix may be left out of a bundled one only


def test_a_name_that_is_nowhere_is_answered_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean phi3_persona\.yaml\?"):
        find_config("phi3_personas.yaml")
    with pytest.raises(ConfigError, match="`personas-tune ls`"):
        find_config("zzz")


# Overrides


def test_an_override_is_split_at_its_first_equals_sign(load):
    assert load(MINIMAL, "data.path=a=b=c").data.path == "a=b=c"


def test_overrides_are_read_as_yaml(load):
    cfg = load(MINIMAL, "seed=7", "distill.dry_run=true", "stages=[persona_prepare]", "data.cohort={n_users: 3}")
    assert (cfg.seed, cfg.distill.dry_run, list(cfg.stages), cfg.data.cohort.n_users) == (
        7,
        True,
        ["persona_prepare"],
        3,
    )


def test_none_and_null_both_mean_nothing(load):
    cfg = load("output_dir: run\ndata: {path: a, encoding: b}\n", "data.path=None", "data.encoding=null")
    assert cfg.data.path is None
    assert cfg.data.encoding is None


def test_a_later_override_wins(load):
    assert load(MINIMAL, "seed=1", "seed=2").seed == 2


def test_a_tilde_removes_a_key(load):
    text = (
        "output_dir: run\nadapter_sets: {a: {}, b: {}}\noptimizer: {_component_: torch.optim.SGD, lr: 1, momentum: 1}\n"
    )
    cfg = load(text, "~adapter_sets.a", "~optimizer.momentum")
    assert list(cfg.adapter_sets) == ["b"]
    assert list(cfg.optimizer) == ["_component_", "lr"]
    assert load(text, "~optimizer").optimizer is None


def test_a_components_key_alone_sets_which_component(load):
    text = "output_dir: run\noptimizer: {_component_: torch.optim.AdamW, lr: 0.1}\n"
    assert load(text, "optimizer=torch.optim.SGD").optimizer == {"_component_": "torch.optim.SGD", "lr": 0.1}


def test_a_list_is_replaced_by_what_is_given(load):
    text = "output_dir: run\ncheckpointer: {_component_: x, checkpoint_files: [a, b]}\n"
    assert load(text, "checkpointer.checkpoint_files=[c]").checkpointer.checkpoint_files == ["c"]
    formatted = "checkpointer.checkpoint_files={filename_format: 'm-{}-{}', max_filename: '2'}"
    assert load(text, formatted).checkpointer.checkpoint_files.filename_format == "m-{}-{}"


def test_the_leading_zeros_of_the_last_file_number_stay(load):
    text = "output_dir: run\ncheckpointer: {_component_: x, checkpoint_files: {filename_format: 'm-{}-{}'}}\n"
    cfg = load(text, "checkpointer.checkpoint_files.max_filename=00002")
    assert cfg.checkpointer.checkpoint_files.max_filename == "00002"


@pytest.mark.parametrize("override", ["seed", "=3", "~nothing", "~data.nothing", "~", "seed=[1", "seed={a: b: c}"])
def test_an_override_that_can_not_be_read_is_named(mistakes, override):
    (line,) = mistakes(MINIMAL, override)
    assert override in line


# Mistakes


def test_all_mistakes_come_at_once_each_with_the_nearest_key(mistakes):
    text = (
        "outputdir: run\ndata: {pth: x, cohort: {n_user: 3}, split: {fraction: 0.5}}\n"
        "adapter_sets: {mine: {memoires: both}}\nagents: {a: {adapter: mine}}\n"
        "bases: {b: {modle: {}, tokenizer: {}, checkpointer: {}}}\nn_users: 5\n"
    )
    assert sorted(line.partition(": ")[2] for line in mistakes(text)) == [
        "key bases.b.model is missing; add bases.b.model: ...",
        "key output_dir is missing; add output_dir: ...",
        "unknown key adapter_sets.mine.memoires; did you mean adapter_sets.mine.memories?",
        "unknown key agents.a.adapter; did you mean agents.a.adapters?",
        "unknown key bases.b.modle; did you mean bases.b.model?",
        "unknown key data.cohort.n_user; did you mean data.cohort.n_users?",
        "unknown key data.pth; did you mean data.path?",
        "unknown key data.split.fraction; did you mean data.split.train_fraction?",
        "unknown key n_users; did you mean data.cohort.n_users?",
        "unknown key outputdir; did you mean output_dir?",
    ]


def test_a_key_that_is_near_to_none_is_answered_with_what_is_known(mistakes):
    (line,) = mistakes("output_dir: run\nretrieval: {qqq: 1}\n")
    assert line == (
        "c.yaml: unknown key retrieval.qqq; "
        "known here: embedder, dim, k, min_similarity, before_target, neighbours, query"
    )  # fmt: skip


def test_a_value_that_fits_neither_kind_is_one_mistake(mistakes):
    assert mistakes(MINIMAL, "personas.k=many") == [
        "override 'personas.k=many': personas.k is 'many'; it should be a valid integer or 'elbow'"
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("epochs=0", "epochs is 0; it should be greater than or equal to 1"),
        ("seed=1.5", "seed is 1.5; it should be a valid integer"),
        ("compile=maybe", "compile is 'maybe'; it should be a valid boolean"),
        ("data.format=json", "data.format is 'json'; it should be 'movielens', 'csv', 'jsonl', 'parquet', 'recbole'"),
        ("output_dir=", "output_dir is null; it should be a valid string"),
        ("output_dir=''", "output_dir is ''; it should be text"),
        ("agents=both", "agents is 'both'; it should be a mapping of keys to values"),
        ("optimizer=torch.optim.SGD", "optimizer is 'torch.optim.SGD'; write optimizer._component_=torch.optim.SGD"),
        ("data.columns.usr=u", "unknown key data.columns.usr; use 'user_id', 'item_id', 'rating' or 'timestamp'"),
        ("clip_grad_norm=.nan", "clip_grad_norm is nan; it should be a finite number"),
        ("data.rating_scale.max=.inf", "data.rating_scale.max is inf; it should be a finite number"),
        ("personas.k=0", "personas: k is 0; it should be at least 1, or elbow"),
        ("data.path=${nowhere}", "data.path: interpolation key 'nowhere' not found; mend the ${...} reference"),
        ("data.path=${oc.env:NOT_SET_HERE}", "environment variable NOT_SET_HERE is not set; export NOT_SET_HERE=..."),
        ("base_training.num_heads=5", "embed_dim 192, num_heads 5 and num_kv_heads 6 don't fit; each head takes"),
    ],
)
def test_a_value_that_can_not_be_is_told_with_what_could(mistakes, override, line):
    (told,) = mistakes(MINIMAL, override)
    assert told.startswith(("c.yaml: data.path: ", f"override {override!r}: "))
    assert line in told


def test_a_mistake_is_blamed_on_the_file_or_on_the_override_that_it_came_with(mistakes):
    text = "output_dir: run\nepocs: 1\nagents: {a: {adapters: mine}}\n"
    assert sorted(mistakes(text, "seed=x", "data.split={by: y}")) == [
        "c.yaml: unknown key epocs; did you mean epochs?",
        "override 'data.split={by: y}': data.split.by is 'y'; it should be 'user_time' or 'global_time'",
        "override 'seed=x': seed is 'x'; it should be a valid integer",
    ]
    # A value above that hasn't the key doesn't set it.
    (of_file,) = mistakes("output_dir: run\ndata: {split: {by: x}}\n", "data={format: world}")
    assert of_file.startswith("c.yaml: data.split.by is 'x'")
    (of_removal,) = mistakes(MINIMAL, "~output_dir")
    assert of_removal == "override '~output_dir': key output_dir is missing; add output_dir: ..."
    (of_file, of_override) = mistakes("output_dir: run\nagents: {a: {adapters: mine}}\n", "agents.b.adapters=yours")
    assert of_file.startswith("c.yaml: agents.a.adapters: no adapter set 'mine'")
    assert of_override.startswith("override 'agents.b.adapters=yours': agents.b.adapters: no adapter set 'yours'")


@pytest.mark.parametrize("nothing", ["null", "None"])
def test_a_component_can_be_set_to_nothing(load, nothing):
    text = "output_dir: run\nlr_scheduler: {_component_: a.b, num_warmup_steps: 3}\n"
    assert load(text, f"lr_scheduler={nothing}").lr_scheduler is None


def test_a_value_that_is_left_open_must_be_given(mistakes, load):
    text = "output_dir: ???\n"
    assert mistakes(text) == ["c.yaml: output_dir: its value ??? must be given; set output_dir=..."]
    assert load(text, "output_dir=run").output_dir == "run"


def test_numbers_as_names_are_refused(mistakes):
    (line,) = mistakes("output_dir: run\nadapter_sets: {4: {}}\n")
    assert line == "c.yaml: unknown key adapter_sets.4; put it in quotes if it is a name"


def test_names_must_refer_to_something(mistakes):
    text = (
        "output_dir: run\nadapter_sets: {mine: {base: phi}}\n"
        "agents: {a: {adapters: yours}, 'b/c': {}}\n"
    )  # fmt: skip
    assert [line.removeprefix("c.yaml: ") for line in mistakes(text)] == [
        "adapter_sets.mine.base: no base 'phi'; under bases: none",
        "agents: 'b/c' can't name a folder; use letters, digits, '_' and '-'",
        "agents.a.adapters: no adapter set 'yours'; under adapter_sets: mine",
    ]


@pytest.mark.parametrize(
    "text", ["a: [1\n", "- 1\n", "a: 1\na: 2\n", "\ta: 1\n", "output_dir: ${\n", "a: !!python/object:os.system {}\n"]
)
def test_what_is_no_yaml_of_keys_is_one_line_that_names_the_file(mistakes, text):
    (line,) = mistakes(text)
    assert line.startswith("c.yaml: not ")


# What a checked experiment holds


def test_defaults_are_filled_in_at_every_depth(load):
    cfg = load("output_dir: run\ndata: {cohort: {n_users: 5}}\nadapter_sets: {mine: {per: all}}\n")
    assert OmegaConf.to_container(cfg.adapter_sets.mine) == {
        "per": "all", "memories": "both", "rows": None, "rows_from": "own", "share": 1.0,
        "start_from": None, "shuffle_personas": False, "peft": None, "base": None,
    }  # fmt: skip
    assert (cfg.data.cohort.n_users, cfg.data.cohort.min_interactions) == (5, 1)
    assert set(cfg) == set(Experiment.model_fields)


def test_values_have_the_type_of_their_key(load):
    cfg = load("output_dir: run\nepochs: '3'\nbatch_size: 4.0\ncompile: 'no'\ndata: {rating_scale: {min: '0'}}\n")
    assert [cfg.epochs, cfg.batch_size, cfg.compile, cfg.data.rating_scale.min] == [3, 4, False, 0.0]
    assert [type(value) for value in (cfg.epochs, cfg.batch_size, cfg.compile)] == [int, int, bool]


def test_references_follow_an_override_and_stay_references_in_settings(load):
    text = (
        "output_dir: run\nseed: 42\n"
        "metric_logger: {_component_: x, log_dir: '${output_dir}/logs', tags: ['${seed}', a]}\n"
    )
    cfg = load(text, "output_dir=elsewhere")
    assert cfg.metric_logger.log_dir == "elsewhere/logs"
    assert settings_of(cfg, "metric_logger", "seed") == {
        "metric_logger": {"_component_": "x", "log_dir": "${output_dir}/logs", "tags": ["${seed}", "a"]},
        "seed": 42,
    }


def test_a_section_may_refer_to_another(load):
    text = (
        "output_dir: run\nmodel: {_component_: x, size: 3}\n"
        "bases: {b: {model: '${model}', tokenizer: {}, checkpointer: {}}}\n"
    )
    cfg = load(text, "model.size=5")
    assert cfg.bases.b.model.size == 5
    assert settings_of(cfg, "bases")["bases"]["b"]["model"] == "${model}"


# Distilling


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("distill.max_usd=5", "distill: max_usd needs prices"),
        ("distill.sampling={stream: true}", "stream can't be set here"),
        ("distill.memory_words=300", "batch_size 10 x memory_words 300"),
        ("distill.prices={input: 1}", "prices has no output"),
        ("distill.max_output_tokens=64", "too many for max_output_tokens 64"),
        ("distill.max_words=650", "10 x memory_words 60 + profile_words 400 = 1000 words, more than max_words 650"),
        ("distill.batch_poll_s=1e300", "distill.batch_poll_s is 1e+300"),
        ("distill.prices={output: 1}", "key distill.prices.input is missing"),
        ("distill.concurrency=0", "distill.concurrency is 0; it should be greater than or equal to 1"),
        ("embedding.inputs_per_request=5000", "embedding.inputs_per_request is 5000"),
    ],
)
def test_settings_of_a_server_are_checked(mistakes, override, told):
    (line,) = mistakes(MINIMAL, "distill.distiller=openai", override)
    assert told in line


# Secrets


@pytest.fixture
def secretive(load, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    text = (
        "output_dir: run\nmodel: {_component_: x, key: '${oc.env:A_SECRET}'}\n"
        "distill: {base_url: 'http://${oc.env:A_SECRET}@host', model: m}\n"
        "metric_logger: {_component_: x, keys: ['${oc.env:A_SECRET}']}\n"
    )
    return load(text)


def test_settings_and_manifests_never_hold_a_secret(secretive, tmp_path):
    assert secretive.model.key == "hunter2"  # where it is used, it is there
    settings = settings_of(secretive, "model", "distill", "metric_logger")
    assert settings["distill"]["base_url"] == "http://${oc.env:A_SECRET}@host"
    with open_stage(tmp_path / "stage", settings) as stage:
        stage.write_text("a.txt", "a")
    assert "hunter2" not in json.dumps(settings) + (tmp_path / "stage" / "manifest.json").read_text(encoding="utf-8")


def test_a_mistake_shows_the_reference_and_not_what_stands_in_the_environment(mistakes, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    lines = mistakes("output_dir: run\nseed: '${oc.env:A_SECRET}'\ndistill: {concurrency: '${oc.env:A_SECRET}'}\n")
    assert any("'${oc.env:A_SECRET}'" in line for line in lines)
    assert "hunter2" not in " ".join(lines)


def test_what_loggers_get_holds_no_secret_and_needs_no_environment(secretive, monkeypatch):
    monkeypatch.delenv("A_SECRET")
    shown = without_secrets(secretive)
    text = OmegaConf.to_yaml(shown, resolve=True)
    assert "hunter2" not in text
    assert shown.model.key == shown.distill.base_url == shown.metric_logger["keys"][0] == "(from the environment)"
    assert shown.distill.model == "m"


def test_what_loggers_get_holds_no_password_of_an_address(load):
    base_url = "http://me:hunter2@localhost:8000/v1?key=hunter2"
    shown = without_secrets(load(MINIMAL, f"distill.base_url={base_url}", f"embedding.base_url={base_url}"))
    assert shown.distill.base_url == shown.embedding.base_url == "http://localhost:8000/v1"


def test_an_error_about_another_key_does_not_print_a_secret(mistakes, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    lines = mistakes("output_dir: run\ndistill: {base_url: '${oc.env:A_SECRET}'}\nsed: 1\n")
    assert "hunter2" not in " ".join(lines)


# Bases and components


def test_bundled_bases_are_paths_inside_the_package():
    folder = Path(bundled_path("bundled://tiny_phi3"))
    assert folder == Path(str(resources.files("personas_tune"))) / "bases" / "tiny_phi3"
    assert bundled_path("checkpoints/x") == "checkpoints/x"


def test_the_sections_of_a_base_are_resolved_and_those_of_another_by_name(load, monkeypatch):
    monkeypatch.setenv("CHECKPOINTS", "/ckpt")
    section = "{_component_: pathlib.Path}"
    text = (
        "output_dir: run\nmodel: {_component_: torch.nn.Linear, in_features: 1, out_features: 2}\n"
        f"tokenizer: {section}\n"
        "checkpointer: {_component_: torch.nn.Linear, out_features: '${oc.env:CHECKPOINTS}/a'}\n"
        f"bases: {{b: {{model: {{_component_: torch.nn.ReLU}}, tokenizer: {section}, checkpointer: {section}}}}}\n"
    )
    cfg = load(text, "tokenizer=pathlib.PurePath")
    default = base_sections(cfg, None)
    assert default["model"]["in_features"] == 1
    assert default["tokenizer"] == {"_component_": "pathlib.PurePath"}
    assert default["checkpointer"]["out_features"] == "/ckpt/a"
    assert base_sections(cfg, "b")["model"] == {"_component_": "torch.nn.ReLU"}


def test_components_are_checked_all_at_once(load):
    text = (
        "output_dir: run\noptimizer: {_component_: torch.optim.AdamX}\n"
        "loss: {_component_: torch.nn.ReLU, inplce: true}\n"
        "lr_scheduler: {_component_: torch.optim}\nprofiler: {enabled: true}\nmetric_logger: {_component_: 5}\n"
    )
    names = ["optimizer", "loss", "lr_scheduler", "profiler", "metric_logger", "model"]
    with pytest.raises(PersonasTuneError) as caught:
        check_components(load(text), names)
    lines = caught.value.lines
    assert [line.partition(": ")[0] for line in lines] == [
        "optimizer._component_", "loss", "lr_scheduler._component_", "profiler", "metric_logger._component_", "model",
    ]  # fmt: skip
    assert "AdamX" in lines[0]
    assert lines[1] == "loss: torch.nn.ReLU got an unexpected keyword argument 'inplce'; it takes inplace"
    assert "section with a _component_ is missing" in lines[3]
    check_components(load(), names, optional=True)


def test_a_section_is_instantiated_with_what_the_user_wrote_and_else_with_the_default(load):
    cfg = load("output_dir: run\nloss: {_component_: torch.nn.NLLLoss, ignore_index: -5}\n")
    assert instantiate(cfg, "loss", default="torch.nn.CrossEntropyLoss", ignore_index=-1).ignore_index == -5
    made = instantiate(load(), "loss", default="torch.nn.CrossEntropyLoss", ignore_index=-1)
    assert (type(made).__name__, made.ignore_index) == ("CrossEntropyLoss", -1)


def test_what_a_recipe_must_add_goes_beside_what_the_user_wrote(load):
    cfg = load("output_dir: run\nlr_scheduler: {_component_: builtins.dict, warmup: 3}\n")
    assert instantiate(cfg, "lr_scheduler", num_training_steps=9) == {"warmup": 3, "num_training_steps": 9}


@pytest.mark.parametrize("path", ["torch.optim.AdamW", "builtins.divmod"])
def test_a_component_that_fails_is_told_by_its_key(load, path):
    with pytest.raises(ConfigError, match=rf"optimizer: {path} failed \(.+\); check its values"):
        instantiate(load(f"output_dir: run\noptimizer: {{_component_: {path}}}\n"), "optimizer", 1)


class HalfMade:
    """As torchtune's loggers: what makes it fails, and what closes it fails again."""

    def __init__(self) -> None:
        raise ValueError("no such folder")

    def __del__(self) -> None:
        raise AttributeError("never opened")


@pytest.mark.filterwarnings("error")
def test_a_component_that_fails_prints_nothing_when_it_is_dropped(load, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(unraisable.exc_value))
    cfg = load(f"output_dir: run\nmetric_logger: {{_component_: {__name__}.HalfMade}}\n")
    with pytest.raises(ConfigError, match="no such folder"):
        instantiate(cfg, "metric_logger")
    assert printed == []


# The command line


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a recipe's main with arguments; give status, the experiment it got, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(MINIMAL, encoding="utf-8")

    def run_main(*arguments, main=None):
        got = []

        @config.parse
        def recipe_main(cfg):
            """Do a thing."""
            got.append(cfg)
            if main is not None:
                main()

        monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
        with pytest.raises(SystemExit) as stop:
            recipe_main()
        captured = capsys.readouterr()
        return stop.value.code, got[0] if got else None, captured.out, captured.err

    return run_main


def test_a_recipe_gets_the_checked_experiment_and_ends_with_0(run):
    status, cfg, out, err = run("--config", "c.yaml", "seed=5", "~data.path", "data.split.by=global_time")
    assert (status, cfg, out) == (2, None, "")  # ~data.path: the file has no such key
    assert err.startswith("error: ~data.path")
    status, cfg, out, err = run("seed=5", "--config", "c.yaml", "data.split.by=global_time")
    assert (status, out, err) == (0, "", "")
    assert (cfg.seed, cfg.data.split.by) == (5, "global_time")


def test_a_users_mistake_ends_with_2_and_a_line_each(run):
    def fail():
        raise_both()

    def raise_both():
        from personas_tune.errors import DataError, SeveralErrors

        raise SeveralErrors([DataError("a", where="x"), DataError("b", remedy="c")])

    assert run("--config", "c.yaml", main=fail)[::3] == (2, "error: x: a\nerror: b; c\n")


def test_a_bug_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(MINIMAL, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", "c.yaml"])

    @config.parse
    def recipe_main(cfg):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        recipe_main()


def test_ctrl_c_ends_with_130_in_a_line(run):
    def interrupt():
        raise KeyboardInterrupt

    status, _, _, err = run("--config", "c.yaml", main=interrupt)
    assert status == 130
    assert len(err.splitlines()) == 1


def test_the_config_must_be_named(run):
    status, cfg, _, err = run("seed=5")
    assert (status, cfg) == (2, None)
    assert "--config" in err


def test_help_says_what_the_recipe_does(run):
    status, _, out, _ = run("--help")
    assert status == 0
    assert "Do a thing." in out
    assert "~key removes it" in out


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("3", 0)])
def test_several_processes_are_refused_by_the_first_alone(run, monkeypatch, rank, lines):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", rank)
    status, cfg, out, err = run("--config", "c.yaml")
    assert (status, cfg, out, len(err.splitlines())) == (2, None, "", lines)
    assert ("this recipe runs in one process, not in 4; leave the flag out" in err) == bool(lines)


def test_one_process_under_torchrun_is_like_none(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("--config", "c.yaml")[0] == 0


# The bundled configs


BUNDLED = pytest.mark.parametrize("name", bundled_configs())


def test_the_configs_of_the_contract_are_bundled():
    assert {"quickstart.yaml", "phi3_persona.yaml"} <= set(bundled_configs())


@BUNDLED
def test_a_bundled_config_loads_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_experiment(name)
    assert cfg.output_dir.startswith("runs/")
    assert os.listdir(tmp_path) == []


@BUNDLED
def test_a_bundled_config_passes_tune_validate(name):
    from torchtune import config as torchtune_config

    torchtune_config.validate(OmegaConf.load(find_config(name)))


@BUNDLED
def test_the_components_of_a_bundled_config_take_its_keys(name):
    cfg = load_experiment(name)
    check_components(cfg, ["optimizer", "lr_scheduler", "loss", "metric_logger", "profiler"], optional=True)
    if cfg.adapter_sets or cfg.agents:
        assert set(base_sections(cfg, None)) == {"model", "tokenizer", "checkpointer"}


@BUNDLED
def test_a_bundled_config_begins_with_its_purpose_and_its_command(name):
    lines = find_config(name).read_text(encoding="utf-8").splitlines()
    header = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert header[0].endswith(".")
    commands = [line for line in header if "tune run persona_" in line]
    assert any(f"--config {name}" in line for line in commands)
    assert any("=" in line.partition(f"--config {name}")[2] for line in commands), "no useful override"


@BUNDLED
def test_every_output_of_a_bundled_config_lies_below_its_output_dir(name):
    written = yaml.safe_load(find_config(name).read_text(encoding="utf-8"))
    for section, key in (("metric_logger", "log_dir"), ("checkpointer", "output_dir"), ("profiler", "output_dir")):
        if written.get(section) and key in written[section]:
            assert written[section][key].startswith("${output_dir}/")


def test_phi3_persona_holds_the_papers_setting():
    cfg = load_experiment("phi3_persona.yaml")
    assert OmegaConf.to_container(cfg.data.cohort) == {
        "n_users": 200, "min_interactions": 100, "max_interactions": 200, "exclude": None,
    }  # fmt: skip
    assert OmegaConf.to_container(cfg.data.split) == {"by": "user_time", "train_fraction": 0.6, "test_rows": 7496}
    assert (cfg.personas.k, cfg.retrieval.k) == (4, 1)
    assert OmegaConf.to_container(cfg.model) == {
        "_component_": "torchtune.models.phi3.lora_phi3_mini", "lora_attn_modules": ["q_proj", "k_proj"],
        "apply_lora_to_mlp": False, "apply_lora_to_output": False, "lora_rank": 256, "lora_alpha": 32,
        "lora_dropout": 0.1,
    }  # fmt: skip
    assert cfg.optimizer._component_ == "torch.optim.AdamW"
    assert (cfg.optimizer.lr, cfg.epochs) == (3e-4, 2)
    generation = cfg.evaluation
    assert (generation.max_new_tokens, generation.temperature, generation.top_k) == (4, 0.3, 50)
    rows = {name: entry.rows for name, entry in cfg.adapter_sets.items() if entry.per == "all"}
    assert rows["single_max"] == "largest_persona"
    assert rows["single_min"] == "smallest_persona"


# torchtune's own keys

STOCK = "phi3/mini_lora_single_device.yaml"
STOCK_KEYS = (
    "model", "tokenizer", "checkpointer", "optimizer", "lr_scheduler", "loss", "metric_logger", "profiler", "epochs",
    "batch_size", "gradient_accumulation_steps", "max_steps_per_epoch", "clip_grad_norm", "compile", "device", "dtype",
    "enable_activation_checkpointing", "resume_from_checkpoint", "log_every_n_steps", "log_peak_memory_stats",
)  # fmt: skip


def stock_config():
    """A config of torchtune's own, which lies beside its recipes."""
    import torchtune

    return OmegaConf.load(Path(torchtune.__file__).parent.parent / "recipes" / "configs" / STOCK)


def test_the_training_sections_of_a_stock_config_may_be_pasted_in(tmp_path):
    stock = stock_config()
    pasted = OmegaConf.create({key: stock[key] for key in STOCK_KEYS} | {"output_dir": "run"})
    OmegaConf.save(pasted, tmp_path / "pasted.yaml")
    cfg = load_experiment(str(tmp_path / "pasted.yaml"))
    for key in STOCK_KEYS:
        assert cfg[key] == pasted[key], key
    assert cfg.checkpointer.output_dir == cfg.metric_logger.log_dir.removesuffix("/logs") == "run"
    check_components(cfg, ["optimizer", "lr_scheduler", "loss", "metric_logger", "profiler"])
    assert base_sections(cfg, None)["model"]["lora_rank"] == 8


def test_a_step_is_batch_size_times_accumulation_and_an_epoch_may_be_cut_after_so_many_steps():
    settings = TrainingSettings(epochs=1, batch_size=2, gradient_accumulation_steps=8)
    assert settings.rows_per_step == 16
    assert [settings.steps_per_epoch(n) for n in (1, 16, 17, 160)] == [1, 1, 2, 10]
    cut = TrainingSettings(epochs=1, batch_size=2, gradient_accumulation_steps=8, max_steps_per_epoch=3)
    assert [cut.steps_per_epoch(n) for n in (17, 160)] == [2, 3]
