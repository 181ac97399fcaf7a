"""One member of a group that holds a block in parts (`test_zero_group.py`): RANK SIZE STORE OUT."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lsi.engine import Engine
from lsi.grid import Grid
from lsi.increment import Increment
from lsi.linear import Parts
from lsi.reconstruct import Method, Reconstruction
from pipeline.deepspeed_engine import DeepSpeedEngine, Offload
from pipeline.partition import bounds

# Odd, so that the second member's part of many tensors is filled up.
HIDDEN, INNER, GROUP = 63, 105, 21
NAMES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
# Of two members the last batch leaves one without a sample, and the first batch gives one of them a micro-batch more.
SAMPLES = (3, 2, 4, 1)
STEPS = 8
LEARNED = Parts("learned", Increment("corner", corner=4), False, torch.float32)
DIRECT = Parts("direct", Increment("dense"), True, torch.float32)
METHOD = Method(Grid(3, GROUP, False), LEARNED, {"clipping": 1e-2, "increment": 1e-2, "rounding": 1e-2}, STEPS)
METHODS = {
    "dense": replace(METHOD, parts=DIRECT),
    "micro-batches": replace(METHOD, micro_batch=1),
    "warm": replace(METHOD, warm_steps=3, recompute=True),
    "signed": replace(METHOD, parts=DIRECT, steps="signed"),
}
Batch = tuple[Tensor, Tensor, dict[str, Any]]


def layer_config() -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=3, num_key_value_heads=3, head_dim=14
    )
    config._attn_implementation = "sdpa"
    return config


def make_block(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = LlamaDecoderLayer(layer_config(), 0)
        for parameter in block.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1)
    return block


def make_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for samples in SAMPLES:
        inputs = torch.randn(samples, 8, HIDDEN, generator=generator)
        rotary = LlamaRotaryEmbedding(layer_config())(inputs, torch.arange(8).unsqueeze(0))
        arguments = {"position_embeddings": rotary, "attention_mask": None}
        with torch.no_grad():
            found.append((inputs, make_block()(inputs, **arguments), arguments))
    return found


BATCHES = make_batches()


def begin(method: Method, engine: Engine | None, seed: int = 0) -> Reconstruction:
    made = Reconstruction(make_block(seed), NAMES, method, engine=engine)
    made.begin_clipping((inputs, arguments) for inputs, _, arguments in BATCHES)
    return made


def steps(reconstruction: Reconstruction, numbers: range = range(STEPS)) -> list[float]:
    return [reconstruction.step(*BATCHES[number % len(BATCHES)]) for number in numbers]


def state_of(reconstruction: Reconstruction) -> dict[str, Tensor]:
    """For all members: what the first one reads while the others serve it, and hands to them."""
    state = {}
    if dist.get_rank() == 0:
        state = {name: tensor.clone() for name, tensor in reconstruction.export_state().items()}
        reconstruction.attachment.dismiss()
    else:
        reconstruction.attachment.follow()
    handed = [state]
    dist.broadcast_object_list(handed, 0)
    return handed[0]


class Found:
    """What a member came to: numbers, and tensors."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    def state(self, name: str, reconstruction: Reconstruction) -> dict[str, Tensor]:
        state = state_of(reconstruction)
        self.tensors |= {f"{name}/{key}": tensor for key, tensor in state.items()}
        return state


def trains(found: Found, engine: DeepSpeedEngine) -> None:
    for name, method in METHODS.items():
        trained = begin(method, engine)
        found.numbers[f"{name}/losses"] = steps(trained)
        found.state(name, trained)
        found.tensors |= {f"{name}/codes/{linear}": codes for linear, codes in codes_of(trained)}


def codes_of(trained: Reconstruction) -> Iterator[tuple[str, Tensor]]:
    """As every member reads them out."""
    for name, linear in trained.linears.items():
        with trained.attachment.whole(linear, together=True):
            yield name, linear.quantized().codes


def goes_on(found: Found, engine: DeepSpeedEngine) -> None:
    """Read out in mid-epoch, once before and once after parts have joined, and taken up where another block was trained: whole,
    and as each member's own part."""
    for name, stop in (("dense", 3), ("warm", 2), ("warm", 5)):
        first = begin(METHODS[name], engine)
        losses = steps(first, range(stop))
        state = state_of(first)
        losses += steps(first, range(stop, stop + 1))
        steps(begin(METHODS[name], engine, seed=5), range(1))
        second = begin(METHODS[name], engine, seed=0)
        second.import_state(state if name == "dense" else {key: own_part(key, tensor) for key, tensor in state.items()})
        losses[stop:] = steps(second, range(stop, STEPS))
        found.numbers[f"{name}-from-{stop}/losses"] = losses
        found.state(f"{name}-from-{stop}", second)


def own_part(name: str, tensor: Tensor) -> Tensor:
    start, stop = bounds(tensor.numel(), dist.get_rank(), dist.get_world_size())
    return tensor if name == "steps" else tensor.flatten()[start:stop]


def holds_a_part(found: Found, engine: DeepSpeedEngine) -> None:
    trained = begin(METHODS["dense"], engine)
    steps(trained, range(1))
    held = trained.attachment.held
    parameters = list(trained.block.parameters())
    found.numbers["tensors"] = len(parameters)
    found.numbers["whole"] = sum(p.ds_numel for p in parameters)
    found.numbers["parts"] = sum(p.ds_tensor.numel() for p in parameters)
    found.numbers["outside of parts"] = sum(p.numel() for p in parameters)
    moments = [t for kept in held.zero.optimizer.state.values() for t in kept.values() if t.ndim]
    found.numbers["trained"] = sum(p.ds_numel for p in parameters if p.requires_grad)
    found.numbers["moments"] = sum(tensor.numel() for tensor in moments)
    found.numbers["masters"] = sum(flat.numel() for flat in held.zero.fp32_partitioned_groups_flat)


def stops_at_nan(found: Found, engine: DeepSpeedEngine) -> None:
    """In the second member's sample alone; the next block begins as if nothing had been."""
    trained = begin(METHODS["micro-batches"], engine)
    steps(trained, range(2))
    before = state_of(trained)
    inputs, targets, arguments = BATCHES[1]
    targets = targets.clone()
    targets[1, 0, 0] = torch.nan
    trained.step(inputs, targets, arguments)
    found.numbers["nan"] = [trained.status, trained.steps_done, trained.step(*BATCHES[0])]
    after = state_of(trained)
    found.numbers["changed by nan"] = [n for n in after if n != "steps" and not torch.equal(after[n], before[n])]
    found.numbers["after nan/losses"] = steps(begin(METHODS["micro-batches"], engine))


def begins_equal(found: Found, engine: DeepSpeedEngine) -> None:
    """Whatever the members' factors are, and whoever of them holds an engine."""
    for name in ("new", "taken in"):
        if name == "new" and dist.get_rank() == 0:
            engine.close()
        with other_factors():
            trained = begin(METHODS["micro-batches"], engine)
        found.numbers[f"{name}/losses"] = steps(trained)


@contextmanager
def other_factors() -> Iterator[None]:
    """In all members but the first a decomposition as another processor might have it."""
    decompose = torch.linalg.svd

    def svd(*arguments: Any, **keywords: Any) -> Any:
        u, s, vh = decompose(*arguments, **keywords)
        return -u, s, -vh

    if dist.get_rank():
        torch.linalg.svd = svd
    yield
    torch.linalg.svd = decompose


def main(rank: int, size: int, store: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    found = Found()
    engine = DeepSpeedEngine("cpu", Offload(parameters=True, optimizer=True))
    for scenario in (trains, goes_on, holds_a_part, stops_at_nan, begins_equal):
        scenario(found, engine)
    engine.close()
    kept = DeepSpeedEngine("cpu", Offload(parameters=False, optimizer=False))
    trained = begin(METHODS["warm"], kept)
    found.numbers["kept/losses"] = steps(trained)
    save_file(found.tensors, out.with_suffix(".safetensors"))
    out.with_suffix(".json").write_text(json.dumps(found.numbers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
