"""What persona_lora does where shared prefixes turn out to give other gradients than separate rows."""

import shutil

import pytest
from pipelines import files_below, run_recipe, write_yaml
from test_resume import experiment
from tiny import write_experiment

from personas_tune.training import fit
from personas_tune.training.self_check import SharingCheck


def test_it_warns_and_trains_on_separate_rows(tiny_checkpoint, tmp_path, monkeypatch):
    root = write_experiment(tmp_path / "run").root
    config = write_yaml(tmp_path / "experiment.yaml", experiment(root, tiny_checkpoint))
    shutil.copytree(root, tmp_path / "off")
    off = run_recipe("persona_lora", config, f"output_dir={tmp_path / 'off'}", "training.prefix_sharing=off")
    assert off.status == 0, off.err

    wrong = SharingCheck(n_rows=4, difference=0.15, tolerance=1e-5)
    monkeypatch.setattr(fit, "check_sharing", lambda *args, **kwargs: wrong)
    with pytest.warns(UserWarning, match=r"4 rows differ .* by 1.5e-01; .* training goes on without sharing"):
        assert run_recipe("persona_lora", config).status == 0
    assert files_below(root / "adapters") == files_below(tmp_path / "off" / "adapters")
