"""What builds need that are for one kind of GPU, said once."""

from __future__ import annotations

from nemoport.compilers.build import Fact, Program

DRIVER = Program(name="nvidia-smi", way_out="run this on a machine with an NVIDIA GPU and its driver")
SM = Fact(
    name="sm",
    command="nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d .",
    accepted=("[0-9]*",),
    way_out="run this on a machine with an NVIDIA GPU",
)
