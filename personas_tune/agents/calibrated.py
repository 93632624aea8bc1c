"""The calibration that ``persona_eval`` fitted for an agent."""

from typing import Any

from personas_tune.agents.records import recorded
from personas_tune.errors import DataError, MissingInputError
from personas_tune.evaluation.calibration import Calibration
from personas_tune.workspace import MANIFEST, Workspace, sha256_of_file

_AGAIN = "run `tune run persona_eval --config ...` again"
_SAME = ("adapters", "memories", "base")  # of an agent: what its distributions depend on


def find_calibration(cfg: Any, workspace: Workspace, name: str) -> Calibration:
    """Read how an agent is calibrated.

    Args:
        cfg: The experiment.
        workspace: Its files.
        name: The agent's.

    Raises:
        MissingInputError: If ``persona_eval`` hasn't calibrated it.
        DataError: If it has calibrated something else: other adapters, other memories, other labels.
    """
    path, manifest = workspace.calibration(name), workspace.root / "eval" / MANIFEST
    if not path.is_file() or not manifest.is_file():
        remedy = "run `tune run persona_eval --config ...` first, with calibrate=true"
        raise MissingInputError("the agent hasn't been calibrated", where=str(path), remedy=remedy)
    agent, then = cfg.agents[name], recorded(manifest, "settings", "agents", name)
    changed = next((key for key in _SAME if then.get(key) != agent[key]), None)
    if changed is not None:
        what = f"calibrated with {changed} {then.get(changed)!r}, which is {agent[changed]!r} now"
        raise DataError(what, where=f"agents.{name}", remedy=_AGAIN)
    inputs = set(recorded(manifest, "inputs").values())
    if agent.adapters is not None and sha256_of_file(workspace.adapter_set(agent.adapters) / MANIFEST) not in inputs:
        raise DataError("calibrated before its adapters were trained", where=str(path), remedy=_AGAIN)
    labels = [float(label) for label in recorded(workspace.prompt_settings).get("labels", ())]
    try:
        return Calibration.of(recorded(path), labels)
    except ValueError as error:
        raise DataError(str(error), where=str(path), remedy=_AGAIN) from error
