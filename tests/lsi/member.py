"""One member of a group that trains a block (`test_group.py`): RANK SIZE STORE OUT METHOD."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from material import NAMES, make_layer, make_task
from safetensors.torch import save_file

from lsi.engine import Engine
from lsi.grid import Grid
from lsi.group import GroupEngine
from lsi.increment import Increment
from lsi.linear import Parts
from lsi.reconstruct import Method, Reconstruction

# The last batch is cut short: in a group of two it leaves one member without a sample.
SAMPLES = (3, 2, 4, 1)
GRID = Grid(3, 32, False)
METHODS = {
    "corner": Method(
        GRID,
        Parts("learned", Increment("corner", corner=4), False, torch.float32),
        {"clipping": 1e-2, "increment": 1e-2},
        8,
        micro_batch=1,
        warm_steps=3,
    ),
    "rounding": Method(
        GRID,
        Parts("direct", Increment("none"), True, torch.float32),
        {"clipping": 1e-2, "rounding": 1e-2},
        8,
        steps="signed",
        recompute=True,
    ),
    "bfloat16": Method(
        GRID,
        Parts("direct", Increment("none"), True, torch.float32),
        {"clipping": 1e-2, "rounding": 1e-2},
        8,
        steps="signed",
        autocast=torch.bfloat16,
    ),
    "dense": Method(
        GRID, Parts("learned", Increment("dense"), False, torch.float32), {"clipping": 1e-2, "increment": 1e-3}, 8
    ),
}


def train(engine: Engine | None, method: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of eight steps, and the state and codes they lead to. In the middle the state is written down and taken up anew."""
    reconstruction = Reconstruction(make_layer(), NAMES, METHODS[method], engine=engine)
    tasks = [make_task(seed=seed, samples=samples) for seed, samples in enumerate(SAMPLES)]
    reconstruction.begin_clipping((task.inputs, task.arguments) for task in tasks)
    losses = [reconstruction.step(task.inputs, task.targets, task.arguments) for task in tasks]
    state = {name: tensor.clone() for name, tensor in reconstruction.export_state().items()}
    reconstruction = Reconstruction(make_layer(), NAMES, METHODS[method], engine=engine)
    reconstruction.import_state(state)
    losses += [reconstruction.step(task.inputs, task.targets, task.arguments) for task in tasks]
    codes = {f"codes/{name}": weight.codes for name, weight in reconstruction.quantized().items()}
    return losses, reconstruction.export_state() | codes


def main(rank: int, size: int, store: str, out: Path, method: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    losses, state = train(GroupEngine(batch_size=4), method)
    save_file({"losses": torch.tensor(losses, dtype=torch.float64)} | state, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5])
