"""Restore the newest checkpoint on every rank; print how far it had come and what was loaded."""

import sys

import torch
import torch.distributed as dist

import runmgr

dist.init_process_group("gloo")
model = torch.nn.ParameterDict(
    {f"layer{index}": torch.nn.Parameter(torch.zeros(1 << 21), requires_grad=False) for index in range(8)}
)
with runmgr.start_run("hosts", ckpt_root_dir=sys.argv[1], resume="latest") as run:
    if len(sys.argv) > 2:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(3.0)
        run.save({"net": model}, epoch=1)
    else:
        epoch = run.restore({"net": model}).epoch
        print(f"rank {run.rank} epoch {epoch} sum {sum(parameter.double().sum() for parameter in model.parameters())}")
dist.destroy_process_group()
