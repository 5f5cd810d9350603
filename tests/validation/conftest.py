"""One thread, so that tests can run beside each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
