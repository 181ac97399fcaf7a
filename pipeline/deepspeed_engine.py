"""The DeepSpeed engine: a block's tensors in host memory, fetched linear by linear (ZeRO-3), its optimizer in host memory too.

One DeepSpeed engine serves all blocks of an actor, since initializing and destroying leaks a block's memory each time: the
first block's module stays, and every later block of the same structure has its tensors and plain attributes put into it.
Another structure makes another engine.

What is relied on, all of it found by reading deepspeed 0.19:

- ZeRO-3 partitions parameters alone, so the linears' buffers become frozen parameters.
- A linear is a leaf: all its tensors are there from its forward's begin to its end, and again in backward, however it computes.
  A leaf's gradients are taken when the gradient of its input is there; so the block's input asks for one.
- What is written to a trained parameter goes to its partition and to the optimizer's own copy: only together are they the value.
- Gradient buffers keep what a step did not reach; they are zeroed before every step.
- Its forward switches autocast off; ours is entered inside.
- In a group, tensors are put together and gradients summed at every linear, so that all members have to come to the same linears in
  the same order: one without samples computes a pass that counts nothing, and mixtures of experts are refused before (`pipeline.checks`).
- Gradients are averaged over the members; the loss is multiplied by their number, since sums are wanted.
- Nothing is compiled: see `deepspeed_ops`.
"""

from __future__ import annotations

import gc
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsi.engine import Attachment, Later, TorchEngine
from lsi.group import even_parts
from lsi.steps import Group, Steps, as_groups, make_optimizer, project, set_rates
from pipeline.deepspeed_ops import load_cpu_adam, start_deepspeed
from pipeline.partition import Partners, Word

MOMENTS = {Word.VALUE: None, Word.FIRST_MOMENT: "exp_avg", Word.SECOND_MOMENT: "exp_avg_sq"}
Adam = Literal["torch", "cpu_adam"]


@dataclass(frozen=True)
class Offload:
    """What is kept in host memory. adam: who steps there; cpu_adam must have been built ahead."""

    parameters: bool
    optimizer: bool
    adam: Adam = "torch"


class Runner(nn.Module):
    """Runs whatever it is handed on the block: DeepSpeed's forward passes through it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        return function()


class DeepSpeedEngine:
    """Takes blocks in, one after the other; see `lsi.engine`. In a group of processes each holds its part of every tensor.

    Raises ValueError for what it cannot train.
    """

    def __init__(self, device: str, offload: Offload) -> None:
        self.device = torch.device(device)
        self.offload = offload
        self.held: Held | None = None

    def attach(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
        steps: Steps,
        groups: Sequence[Group],
    ) -> Attachment:
        if not parameters:
            return TorchEngine().attach(block, linears, parameters, steps, groups)
        own = dict(block.named_parameters())
        if foreign := [name for name in parameters if name not in own]:
            raise ValueError(f"{foreign[0]} is no parameter of the block: DeepSpeed trains those alone")
        buffers_to_parameters(linears.values())
        structure = structure_of(block, steps, groups)
        deepspeed = start_deepspeed(self.device.type)
        ready = self.held is not None and self.held.structure == structure and not self.held.busy
        # A member that did something else meanwhile may hold nothing.
        if not Partners().all_of(ready):
            self.close()
        if self.held is None:
            self.held = Held(deepspeed, block, linears, steps, groups, structure, self.device, self.offload)
        else:
            self.held.take_in(block)
        return DeepSpeedAttachment(self.held, {name: group.start for group in groups for name in group.names})

    def close(self) -> None:
        """Let go of all memory. What was attached is of no use afterwards."""
        if self.held is not None:
            self.held.close()
            self.held = None
            gc.collect()


def buffers_to_parameters(modules: Any) -> None:
    """Make frozen parameters of the modules' floating-point buffers."""
    for parent in modules:
        for module in parent.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point():
                    delattr(module, name)
                    module.register_parameter(name, nn.Parameter(buffer.contiguous(), requires_grad=False))


def structure_of(block: nn.Module, steps: Steps, groups: Sequence[Group]) -> object:
    """Equal for blocks whose tensors can take each other's places."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    tensors = tuple((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in block.named_parameters())
    buffers = tuple((n, tuple(t.shape), t.dtype) for n, t in block.named_buffers())
    return modules, tensors, buffers, steps, tuple(groups)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps beside tensors, modules and hooks: layer numbers, kinds of attention, scales."""
    internal = set(vars(nn.Module())) - {"training"}
    return {name: value for name, value in vars(module).items() if name not in internal}


class Held:
    """The DeepSpeed engine and the module that it was made with. busy: a step was begun and did not come to its end."""

    def __init__(
        self,
        deepspeed: Any,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        steps: Steps,
        groups: Sequence[Group],
        structure: object,
        device: torch.device,
        offload: Offload,
    ) -> None:
        self.block, self.structure, self.busy, self.block_number = block, structure, False, 0
        self.partners = Partners()
        block.register_forward_pre_hook(ask_for_gradient)
        for module in block.modules():
            for name, buffer in module.named_buffers(recurse=False):
                # A copy, for `take_in` to write to: what is attached may be shared.
                setattr(module, name, self.partners.take_over(buffer.to(device, copy=True)))
        for linear in linears.values():
            deepspeed.utils.set_z3_leaf_module(linear, True)
        own = dict(block.named_parameters())
        largest = max(sum(p.numel() for p in linear.parameters()) for linear in linears.values())
        self.runner = Runner(block)
        settings = ds_settings(offload, largest, pinned=device.type == "cuda", group=self.partners.size > 1)
        # In a group every tensor becomes the first one's here.
        deepspeed.zero.Init(module=self.runner, config_dict_or_path=settings)
        self.engine = deepspeed.initialize(
            model=self.runner, optimizer=client_optimizer(steps, groups, own, offload), config=settings
        )[0]
        self.zero = self.engine.optimizer
        self.parameters, self.steps, self.counts_in_python = own, steps, offload.adam == "cpu_adam"
        self.hooks = {module: set(module._forward_pre_hooks) for module in block.modules()}

    def take_in(self, block: nn.Module) -> None:
        """Put another block's tensors and plain attributes in the place of the one before's."""
        self.block_number += 1
        self.zero.optimizer.state.clear()
        for module, source in zip(self.block.modules(), block.modules(), strict=True):
            vars(module).update(plain_attributes(source))
            for hook in set(module._forward_pre_hooks) - self.hooks[module]:
                del module._forward_pre_hooks[hook]
        for kept, given in zip(self.block.buffers(), block.buffers(), strict=True):
            kept.copy_(self.partners.take_over(given.clone()))
        for name, parameter in block.named_parameters():
            self.write(self.parameters[name], self.partners.take_over(parameter.detach()))
            parameter.data = parameter.new_empty(0)

    @torch.no_grad()
    def write(self, parameter: Any, value: Tensor) -> None:
        """A parameter's new value, of which this process keeps its part; or that part."""
        partition, part = parameter.ds_tensor, self.own(parameter, value)
        if parameter.requires_grad:
            partition[: len(part)].copy_(part)
            self.write_master(parameter, None, value)
        elif self.partners.size == 1 and partition.device == value.device and not partition.is_pinned():
            partition.data = part
        else:
            partition[: len(part)].copy_(part)

    def own(self, parameter: Any, value: Tensor) -> Tensor:
        """This process's part, flat, of a value or of what is that part already."""
        return self.partners.own(value.reshape(-1)) if value.numel() == parameter.ds_numel else value

    def write_master(self, parameter: Any, key: str | None, value: Tensor) -> None:
        """The optimizer's own copy of a trained parameter, or one of its moments."""
        part = self.own(parameter, value)
        self.master(parameter, key)[: len(part)].copy_(part)

    def master(self, parameter: Any, key: str | None) -> Tensor:
        """The same as this process holds it: a view, flat and in a group filled up at its end."""
        found = self.zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)[0]
        part: Tensor = found.detach()
        return part

    def starts(self) -> list[int]:
        """After how many steps each of the optimizer's flat parameters joins."""
        groups, of_flat = self.zero.optimizer.param_groups, self.zero.sub_group_to_group_id
        return [groups[of_flat[number]]["start"] for number in range(len(self.zero.fp32_partitioned_groups_flat))]

    def forget_moments(self, done: int) -> None:
        """Of what has not joined in `done` steps: it was stepped with a rate of zero."""
        for flat, start in zip(self.zero.fp32_partitioned_groups_flat, self.starts(), strict=True):
            if done <= start:
                self.zero.optimizer.state.pop(flat, None)

    def forget_gradients(self) -> None:
        self.zero.zero_grad()
        self.zero.grad_partitions_flat_buffer.zero_()
        for flat in self.zero.fp32_partitioned_groups_flat:
            if flat.grad is not None:
                flat.grad.zero_()

    def close(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        self.block_number = -1
        self.engine.destroy()
        # What destroy leaves behind: an entry of a stack that every initialize grows, and, in objects that something
        # goes on pointing at, all tensors of the block.
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self.runner]
        self.zero.optimizer.state.clear()
        for parameter in self.block.parameters():
            partition: Any = parameter.__dict__["ds_tensor"]
            partition.data = parameter.data = parameter.new_empty(0)
        for flat in (*self.zero.fp32_partitioned_groups_flat, *self.zero.fp16_partitioned_groups_flat):
            flat.data, flat.grad = flat.new_empty(0), None
        self.engine.optimizer = None
        vars(self.zero).clear()


def ask_for_gradient(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before the block's forward: see the module's text on leaves."""
    return arguments[0].detach().requires_grad_(), *arguments[1:]


def ds_settings(offload: Offload, largest: int, *, pinned: bool, group: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. largest: numbers in the largest linear, which is read ahead while another computes."""
    host = {"device": "cpu", "pin_memory": pinned}
    zero: dict[str, Any] = {
        "stage": 3,
        "contiguous_gradients": False,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": 2 * largest,
        "stage3_max_reuse_distance": 0,
        # It would patch torch's own linear for the whole process and leave the patch behind.
        "memory_efficient_linear": False,
    }
    if group:
        # One tensor after another, each gathered where it is used and each gradient cut up when the next one comes: in one go
        # all of a linear's tensors would be there twice, and the gradients of half a billion numbers whole.
        zero |= {"allgather_sequential": True, "reduce_bucket_size": 1}
    if group and not pinned:
        zero["stage3_prefetch_bucket_size"] = 0  # the processor that computes is the one that would read ahead
    zero |= {"offload_param": host} if offload.parameters else {}
    zero |= {"offload_optimizer": host} if offload.optimizer else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def client_optimizer(
    steps: Steps, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter], offload: Offload
) -> torch.optim.Optimizer:
    """Plain torch's, or DeepSpeed's for the host."""
    if steps == "adamw" and offload.adam == "cpu_adam":
        load_cpu_adam()
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        adam: torch.optim.Optimizer = DeepSpeedCPUAdam(as_groups(groups, parameters), weight_decay=0.0, adamw_mode=True)
        adam.register_step_post_hook(lambda stepped, arguments, keywords: project(stepped))
        return adam
    return make_optimizer(steps, groups, parameters)


class DeepSpeedAttachment:
    """One block in a DeepSpeed engine; see `lsi.engine`."""

    def __init__(self, held: Held, starts: Mapping[str, int]) -> None:
        self.held, self.starts, self.taken = held, starts, 0
        self.partners = held.partners
        self.number = held.block_number
        self.block = held.block
        self.parameters: Mapping[str, nn.Parameter] = {name: held.parameters[name] for name in starts}

    def _check(self) -> None:
        if self.held.block_number != self.number:
            raise RuntimeError("this block's engine was closed or has taken in another block since")

    def parts(self, samples: int, most: int | None) -> list[slice]:
        """A linear's tensors are put together by all members."""
        return even_parts(samples, self.partners.rank, self.partners.size, most)

    def total(self, counts: list[int]) -> list[int]:
        found: list[int] = self.partners.summed(torch.tensor(counts, dtype=torch.int64)).tolist()
        return found

    def follow(self) -> None:
        if self.partners.rank:
            self._serve(Word.DISMISSED)

    def dismiss(self) -> None:
        self.partners.tell(Word.DISMISSED)

    def _serve(self, until: Word) -> None:
        """Take part in what the first member reads, until it says that word."""
        while True:
            word, number = self.partners.hear()
            if word == until:
                return
            if word == Word.MODULE:
                with self._gathered(list(self.block.modules())[number]):
                    continue
            if word not in MOMENTS:
                raise RuntimeError(f"the first member of the group says {word.name}, where {until.name} comes next")
            self._collected(word, number)

    def _collected(self, word: Word, number: int) -> Tensor:
        """The value or a moment of the parameter of that number; nothing in others than the first member."""
        parameter: Any = list(self.parameters.values())[number]
        return self.partners.collect(self.held.master(parameter, MOMENTS[word]), parameter.ds_shape)

    def begin(self, done: int, total: int) -> None:
        self._check()
        if self.partners.rank:
            self._serve(Word.STEP)
        else:
            self.partners.tell(Word.STEP)
        self.held.busy = True
        self.held.forget_gradients()
        set_rates(self.held.zero.optimizer, self.held.steps, done, total)

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        self._check()
        output: Tensor = self.held.engine(function)
        if not torch.is_grad_enabled():
            # No backward pass uses up what has been read ahead for it.
            self.held.zero.parameter_offload.get_param_coordinator().reset_step()
        return output

    def backward(self, loss: Tensor) -> None:
        self.held.engine.backward(loss * self.partners.size)

    def step(self, loss: Tensor) -> tuple[float, bool]:
        engine, zero, value = self.held.engine, self.held.zero, self.partners.summed(loss).item()
        if not math.isfinite(value):
            return value, False
        engine.step()
        self.held.busy = False
        # A gradient's norm that is not finite is an overflow to it, and nothing is updated.
        if zero.overflow:
            return value, False
        self.taken += 1
        self.held.forget_moments(self.taken)
        return value, True

    @contextmanager
    def whole(self, module: nn.Module, *, changing: bool = False, together: bool = False) -> Iterator[None]:
        self._check()
        if not (changing or together):
            self.partners.tell(Word.MODULE, next(n for n, m in enumerate(self.block.modules()) if m is module))
        trained = [parameter for parameter in module.parameters() if changing and parameter.requires_grad]
        with self._gathered(module):
            yield
            written = [parameter.detach().clone() for parameter in trained]
        for parameter, value in zip(trained, written, strict=True):
            self.held.write(parameter, self.partners.take_over(value))

    @contextmanager
    def _gathered(self, module: nn.Module) -> Iterator[None]:
        import deepspeed

        with without_hooks(module), deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield

    def export_state(self) -> dict[str, Later]:
        self._check()
        kept = any("exp_avg" in moments for moments in self.held.zero.optimizer.state.values())
        state = {f"value/{name}": self._later(Word.VALUE, name) for name in self.parameters}
        for name in (name for name, start in self.starts.items() if kept and self.taken > start):
            state[f"first/{name}"] = self._later(Word.FIRST_MOMENT, name)
            state[f"second/{name}"] = self._later(Word.SECOND_MOMENT, name)
        return state

    def _later(self, word: Word, name: str) -> Later:
        number, parameter = list(self.parameters).index(name), self.held.parameters[name]
        shape: torch.Size = parameter.__dict__["ds_shape"]

        def make() -> Tensor:
            self._check()
            self.partners.tell(word, number)
            return self._collected(word, number)

        return Later(torch.float32, tuple(shape), make)

    @torch.no_grad()
    def import_state(self, state: dict[str, Tensor], steps: int) -> None:
        self._check()
        optimizer = self.held.zero.optimizer
        optimizer.state.clear()
        self.taken = steps
        moments = any(name.startswith("first/") for name in state)
        flats = zip(self.held.zero.fp32_partitioned_groups_flat, self.held.starts(), strict=True)
        for flat, done in ((flat, steps - start) for flat, start in flats if moments and steps > start):
            optimizer.state[flat] = {
                "step": done if self.held.counts_in_python else torch.tensor(float(done), device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        for name, parameter in self.parameters.items():
            self.held.write(parameter, state.pop(f"value/{name}"))
            if moments and steps > self.starts[name]:
                self.held.write_master(parameter, "exp_avg", state.pop(f"first/{name}"))
                self.held.write_master(parameter, "exp_avg_sq", state.pop(f"second/{name}"))


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """DeepSpeed's hooks would take the tensors away again in the middle of what the caller does with them."""
    kept = [(part, part._forward_pre_hooks, part._forward_hooks) for part in module.modules()]
    for part, *_ in kept:
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, before, after in kept:
            part._forward_pre_hooks, part._forward_hooks = before, after
