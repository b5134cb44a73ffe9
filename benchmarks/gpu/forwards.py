"""Run forwards of some blocks on all processes in an endless loop, for `parallel.kill`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from lightx2v.config.environment import Environment
from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.rendezvous import join

from .model import expert
from .ranks import Ranks, call_of


@torch.inference_mode()
def main() -> None:
    group = join(Environment.read())
    bench = Ranks(group, Path("/dev/null"), tiny=not torch.cuda.is_available(), largest=True)
    dit = expert(bench, replace(bench.sizes.dit, num_layers=bench.sizes.few_layers))
    call = call_of(bench, dit, list(bench.sizes.clips)[-1], Mesh(group, 1, group.size), 1)
    with group.collective():
        while True:
            call()
            bench.ready()
            sys.stdout.write("denoise\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
