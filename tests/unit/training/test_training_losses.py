"""The figures of every step are kept, through a checkpoint too, and come out as a table."""

from itertools import islice

import pyarrow as pa
from small_training import small_training
from test_training_state import assert_same, through_json

from personas_tune.training.fit import StepFigures
from personas_tune.training.state import job_state, restore_job
from personas_tune.training.step_log import losses_table


def test_a_job_keeps_the_figures_of_its_steps():
    training = small_training()
    reports = list(training.steps())
    for job in training.jobs:
        mine = [report for report in reports if report.adapter == job.name]
        assert job.history == [report.figures for report in mine]
        assert [(f.step, f.loss, f.learning_rate, f.n_rows, f.validation_loss) for f in job.history] == [
            (r.step, r.loss, r.learning_rate, r.n_rows, r.validation_loss) for r in mine
        ]
        assert [r.validation_loss for r in mine if r.validation_loss is not None] == job.validation_losses


def test_a_restored_job_has_the_figures_of_an_unbroken_one():
    unbroken = small_training()
    unbroken.to_the_end()
    stopped, again = small_training(), small_training()
    list(islice(stopped.steps(), 5))
    for job, fresh in zip(stopped.jobs, again.jobs, strict=True):
        restore_job(again.bank, fresh, through_json(job_state(stopped.bank, job)))
        assert fresh.history == job.history
    list(again.steps())
    assert_same([job.history for job in again.jobs], [job.history for job in unbroken.jobs])


def test_the_table_has_a_row_per_step_of_each_adapter_in_the_order_given():
    table = losses_table(
        {
            "1": [StepFigures(1, 0.5, 1e-3, 16, None), StepFigures(2, 0.25, 5e-4, 3, 0.75)],
            "0": [StepFigures(1, 2.0, 1e-3, 8, None)],
            "2": [],
        }
    )
    assert table.to_pylist() == [
        {"adapter": "1", "step": 1, "loss": 0.5, "learning_rate": 1e-3, "n_rows": 16, "validation_loss": None},
        {"adapter": "1", "step": 2, "loss": 0.25, "learning_rate": 5e-4, "n_rows": 3, "validation_loss": 0.75},
        {"adapter": "0", "step": 1, "loss": 2.0, "learning_rate": 1e-3, "n_rows": 8, "validation_loss": None},
    ]
    assert table.schema == losses_table({}).schema
    assert table.schema.field("validation_loss").type == pa.float64()
