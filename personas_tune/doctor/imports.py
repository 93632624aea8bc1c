"""Whether the PEFT folders of sets that are imported fit a base; its weights aren't loaded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from personas_tune.adapters.base_model import missing_base_files
from personas_tune.adapters.importing import check_imports
from personas_tune.doctor.findings import Finding
from personas_tune.doctor.knobs import adapters_of, sets_of

if TYPE_CHECKING:
    from omegaconf import DictConfig


def check_imported_sets(cfg: "DictConfig", name: str | None, sections: Mapping[str, Any]) -> list[Finding]:
    """Whether each set that is imported on a base can be.

    Args:
        cfg: The experiment.
        name: Of the base; None for the default one.
        sections: Its ``model``, ``tokenizer`` and ``checkpointer``; without their files nothing can be told.
    """
    imported = {key: each for key, each in sets_of(cfg, name).items() if each.peft is not None}
    if missing_base_files(**sections):
        return []
    findings: list[Finding] = []
    for key, each in imported.items():
        where, names = f"adapter_sets.{key}.peft", adapters_of(cfg, each)
        problems = check_imports(each.peft, names, each.per, **sections, where=where)
        lines = [line for problem in problems for line in problem.lines]
        findings += [Finding("missing", line) for line in lines]
        if not problems:
            findings.append(Finding("ok", f"{where} {each.peft}: {len(names)} PEFT adapters fit the base"))
    return findings
