"""DeepSpeed's compiled operators: started without any, built ahead by `lsi doctor --build`, loaded as they were built."""

from __future__ import annotations

import os
import socket


def start_deepspeed(device: str) -> None:
    os.environ["DS_ACCELERATOR"] = device
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(here)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


def load_cpu_adam() -> None:
    raise NotImplementedError
