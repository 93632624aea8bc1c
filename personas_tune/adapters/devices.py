"""The device that a base runs on."""

import torch

from personas_tune.errors import ConfigError


def find_device(name: str) -> torch.device:
    """The device that a config names.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ...

    Raises:
        ConfigError: If it is another kind of device, or isn't on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}", where="device", remedy="use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} has not been tried", where="device", remedy="use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device on this machine", where="device", remedy="set device=cpu dtype=fp32")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        n_gpus = torch.cuda.device_count()
        raise ConfigError(f"no device {name!r} among the {n_gpus} GPUs here", where="device", remedy="set device=cuda")
    return device
