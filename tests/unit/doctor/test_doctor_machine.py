"""What the doctor says of a machine, broken ones included; versions are made up where importlib.metadata gives them."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from personas_tune import cli, doctor
from personas_tune.doctor import machine, packages, stages
from personas_tune.doctor.findings import Finding
from personas_tune.errors import PersonasTuneError


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `personas-tune doctor` in an empty folder; give status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "LEAST_DISK_GB", 0)

    def run_main(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["doctor", *arguments])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run_main


def states(out):
    return [line.split()[0] for line in out.splitlines() if line.startswith("  ")]


def test_nothing_is_missing_in_this_environment_and_every_pin_is_named(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    assert set(states(out)) <= {"ok", "note"}
    assert all(f" {name} " in out for name in ("python", "torchtune", "torchao", "torch", "pyarrow", "faiss-cpu"))
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        "packages", "optional packages", "commands", "machine",
    ]  # fmt: skip


def test_a_package_of_another_version_is_missing_with_the_mending_command(monkeypatch):
    lines = ["torchao<0.16,>=0.14.1", "numpy>=2", "gone_for_good>=1", "wandb; extra == 'wandb'"]
    monkeypatch.setattr(packages, "requires", lambda name: lines)
    monkeypatch.setattr(packages, "version", lambda name: {"torchao": "0.17", "numpy": "2.4"}.get(name) or lack(name))
    _, torchao, numpy, gone, _ = packages.check_packages()
    assert str(torchao) == "missing  torchao 0.17 (works: <0.16,>=0.14.1); pip install 'torchao<0.16,>=0.14.1'"
    assert numpy.state == "ok"
    assert str(gone) == "missing  gone_for_good is not installed; pip install 'gone_for_good>=1'"
    (wandb,) = packages.check_extras()
    assert str(wandb) == "note     wandb: wandb is not installed; pip install 'personas-tune[wandb]' if wanted"


def lack(name):
    raise PackageNotFoundError(name)


def test_another_python_is_missing(monkeypatch):
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.14.1")
    assert str(packages.check_python()).startswith("missing  python 3.14.1 (works: ")


def test_where_the_package_is_not_installed_the_doctor_says_so(monkeypatch, run):
    for name in ("requires", "metadata"):
        monkeypatch.setattr(packages, name, lack)
    status, out, _ = run()
    assert status == 2
    assert "missing  personas-tune itself is not installed; pip install personas-tune" in out


@pytest.mark.parametrize("failing", ["torch", "torchtune"])
@pytest.mark.parametrize("error", [ImportError("no such\nbecause"), RuntimeError(""), OSError("libcudart.so.12")])
def test_an_import_that_fails_in_any_way_is_a_finding(monkeypatch, failing, error):
    whole = packages.importlib.import_module

    def fail(name):
        if name == failing:
            raise error
        return whole(name)

    monkeypatch.setattr(packages.importlib, "import_module", fail)
    told = str(packages.check_imports())
    assert told.startswith(f"missing  {failing} does not import (")
    assert "\n" not in told


def test_the_doctor_works_where_torch_and_openai_do_not(tmp_path):
    """In a process of its own, in which these modules can't be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'torchtune', 'torchao', 'openai', 'sklearn', 'faiss'): sys.modules[name] = None\n"
        "from personas_tune import cli\ncli.main(['doctor', *sys.argv[1:]])"
    )
    for arguments in ([], ["--config", "quickstart.yaml"], ["--config", "phi3_persona.yaml"]):
        ran = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 2
        assert "missing  torch does not import (" in ran.stdout
        assert "Traceback" not in ran.stderr
        (line,) = ran.stderr.splitlines()
        assert line.startswith("error: doctor: ")
    assert "bases are not looked at, since torch and torchtune don't import together" in ran.stdout


# Commands


def test_a_tune_of_another_environment_or_none_on_the_path_is_told(monkeypatch, tmp_path):
    other = tmp_path / "tune"
    other.touch()
    ours = Path(sys.executable).parent / "tune"
    monkeypatch.setattr(packages.shutil, "which", lambda name: str(other))
    assert str(packages._check_tune()).startswith(f"note     the shell finds another `tune` ({other}); activate")
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    assert packages._check_tune().what == "the shell finds no `tune`"
    monkeypatch.setattr(packages.shutil, "which", lambda name: str(ours))
    assert packages._check_tune() == Finding("ok", f"tune is {ours}")


def test_files_that_stand_in_the_way_of_recipes_are_told(run):
    Path("persona_lora.py").write_text("", encoding="utf-8")
    Path("recipes").mkdir()
    Path("recipes/__init__.py").touch()
    status, out, _ = run()
    assert status == 0
    assert "note     persona_lora.py in this folder may run in the place of the installed recipe" in out
    assert "note     recipes/ in this folder hides torchtune's own package of recipes" in out


def test_a_recipe_that_is_not_installed_is_missing(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "persona_lora" else True)
    assert any(str(each).startswith("missing  recipes: ") and "persona_lora" in each.mend
               for each in packages.check_commands())  # fmt: skip


def test_the_registry_knows_every_recipe():
    assert set(stages.RECIPES) == set(cli.RECIPES)


# The machine


def test_a_gpu_is_missed_only_by_an_experiment_that_asks_for_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [machine.check_gpus(device)[0].state for device in (None, "cpu", "cuda", "cuda:0")] == [
        "note", "ok", "missing", "missing",
    ]  # fmt: skip


def test_a_device_that_bases_can_not_run_on_is_missing(monkeypatch):
    assert str(machine.check_gpus("mps")[0]) == "missing  device 'mps' has not been tried; use cpu or cuda"
    assert machine.check_gpus("gpu")[0].state == "missing"
    give_gpus(monkeypatch, n=2)
    assert machine.check_gpus("cuda:1", "bf16")[0].state == "ok"
    (finding,) = machine.check_gpus("cuda:7", "bf16")
    assert str(finding) == "missing  no device 'cuda:7' among the 2 GPUs here; set device=cuda"
    assert [device.name for device in doctor._devices("cuda:1", None)] == ["GPU 1 H200"]
    assert doctor._devices("cuda:7", None) == []


def write_files(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")


def test_a_container_s_limit_counts_where_it_leaves_less(tmp_path):
    write_files(tmp_path, proc__meminfo="MemTotal: 9 kB\nMemAvailable:    5000 kB\n")
    assert machine.main_memory(tmp_path).free == 5_120_000
    limits = {"sys__fs__cgroup__memory_dot_max": "3000000\n", "sys__fs__cgroup__memory_dot_current": "2000000\n"}
    write_files(tmp_path, **limits, sys__fs__cgroup__memory_dot_stat="anon 1500000\ninactive_file 500000\n")
    assert machine.main_memory(tmp_path).free == 1_500_000
    write_files(tmp_path, sys__fs__cgroup__memory_dot_max="max\n")
    assert machine.main_memory(tmp_path).free == 5_120_000
    older = tmp_path / "sys/fs/cgroup/memory"
    older.mkdir()
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "1000"), ("stat", "total_inactive_file 0")):
        (older / f"memory.{name}").write_text(text, encoding="ascii")
    assert machine.main_memory(tmp_path).free == 0
    assert machine.main_memory(tmp_path / "nowhere") is None


def test_what_needs_a_config_is_refused_without_one(run):
    for arguments in (["--gpu-memory", "24"], ["gibberish"], ["batch_size=1"]):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err == f"error: {arguments[0]}: says nothing without a config; add --config NAME\n"


def give_gpus(monkeypatch, free=70e9, capability=(9, 0), n=1):
    """GPUs as torch would tell of them; there is none here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index=0: (int(free), 141_000_000_000))


def test_gpus_are_told_with_memory_and_what_they_can(monkeypatch):
    give_gpus(monkeypatch, n=2)
    first, second, nccl = machine.check_gpus("cuda", "bf16")
    assert str(first) == "ok       GPU 0 H200: 70.0 of 141.0 GB free, compute capability 9.0, bf16"
    assert (second.state, nccl.state) == ("ok", "ok" if torch.distributed.is_nccl_available() else "missing")
    give_gpus(monkeypatch, capability=(7, 5))
    assert [machine.check_gpus("cuda", dtype)[0].state for dtype in ("bf16", "fp32")] == ["missing", "ok"]


def test_more_threads_than_cores_are_a_note():
    assert [each.state for each in machine.check_processor({"OMP_NUM_THREADS": "4096"})] == ["ok", "note"]
    assert len(machine.check_processor({"OMP_NUM_THREADS": "1"})) == len(machine.check_processor({})) == 1


def test_little_disk_is_a_note_and_next_to_none_a_lack(monkeypatch):
    monkeypatch.setattr(machine, "LOW_DISK_GB", 1e9)
    assert [each.state for each in machine.check_disk()] == ["note"]
    monkeypatch.setattr(machine, "LEAST_DISK_GB", 1e9)
    assert [each.state for each in machine.check_disk()] == ["missing"]


def test_a_folder_that_can_not_be_written_into_is_missing(tmp_path):
    (tmp_path / "file").touch()
    told, _ = machine.check_disk(str(tmp_path / "file" / "run"))
    assert told.state == "missing"
    assert machine.check_disk(str(tmp_path / "new" / "run"))[0].state == "ok"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_all_is_printed_before_the_error(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "check_packages", lambda: [Finding("missing", "a is not installed", "pip install a")])
    monkeypatch.setattr(machine, "LEAST_DISK_GB", 0)
    with pytest.raises(PersonasTuneError, match=r"1 of \d+ checks found something missing"):
        doctor.print_findings(None)
    assert "  missing  a is not installed; pip install a\n" in capsys.readouterr().out
