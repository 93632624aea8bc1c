"""Components that leave time for mishaps, or make them; a config names them."""

import os
import resource
import time

import torch
from torch import nn


class SlowLoss(nn.CrossEntropyLoss):
    """Leaves time to be killed in."""

    def forward(self, logits, targets):
        time.sleep(0.03)
        return super().forward(logits, targets)


class NanInSecondProcess(nn.CrossEntropyLoss):
    """Isn't finite after some steps."""

    n_calls = 0

    def forward(self, logits, targets):
        self.n_calls += 1
        loss = super().forward(logits, targets)
        return loss * float("nan") if os.environ["RANK"] == "1" and self.n_calls > 5 else loss


class FullDiskInSecondProcess(torch.optim.AdamW):
    """Lets no file become larger than a checkpoint's first ones."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
