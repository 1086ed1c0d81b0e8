"""What processes that train together do with each other: sums, and parts of tensors. Alone, nothing of torch.distributed is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kompressor_worker.distil.lesson import Group, StoredModel
from kompressor_worker.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Sums = Callable[[Sequence[float]], list[float]]
"""The sum of each of these numbers over all processes."""


@dataclass(frozen=True)
class Together:
    group: Group
    device: torch.device
    mesh: DeviceMesh | None = None
    """Of all processes; None: this one is alone."""

    @classmethod
    def of(cls, group: Group, device: torch.device) -> Together:
        if group.size == 1:
            return cls(group, device)
        from torch.distributed.device_mesh import init_device_mesh

        return cls(group, device, init_device_mesh(device.type, (group.size,)))

    def sums(self, values: Sequence[float]) -> list[float]:
        if self.mesh is None:
            return list(values)
        import torch.distributed as dist

        held = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(held)
        return [float(x) for x in held]

    def told(self, word: str) -> str:
        """The leader's, in all processes."""
        if self.mesh is None:
            return word
        import torch.distributed as dist

        held = [word]
        dist.broadcast_object_list(held)
        return held[0]

    def spread(self, parts: Sequence[memoryview]) -> None:
        """Fills these with what the leader's hold."""
        if self.mesh is None:
            return
        import torch.distributed as dist

        for part in (part for part in parts if len(part)):
            held = torch.frombuffer(part, dtype=torch.uint8)
            on_its_way = held.to(self.device)
            dist.broadcast(on_its_way, 0)
            if not self.group.leads:
                held.copy_(on_its_way)

    def shard(self, dtype: torch.dtype, trained: bool) -> Callable[[nn.Module], None]:
        """A module's tensors cut into a part for each process (FSDP2); they are whole while it computes. What they are whole in is `dtype`
        where hidden states are in that, else the masters' own; gradients are summed in fp32."""
        if (mesh := self.mesh) is None:
            return lambda module: None
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        lower = dtype if trained and dtype is not torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)

        def shard(module: nn.Module) -> None:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)

        return shard

    def gathered(self, module: nn.Module, then: Callable[[], None]) -> None:
        """`then` in the leader, while the module's own tensors are whole."""
        sharded: Any = module
        if self.mesh is not None:
            sharded.unshard()
        if self.group.leads:
            then()
        if self.mesh is not None:
            sharded.reshard()

    def part_of(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """The process's part of `whole`, cut as the parameter is."""
        if self.mesh is None:
            return whole
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()

    def like(self, part: Tensor, parameter: Tensor) -> Tensor:
        """A process's part as a piece of the whole tensor that the parameter has the shape of."""
        if self.mesh is None or part.dim() == 0:
            return part
        from torch.distributed.tensor import DTensor

        assert isinstance(parameter, DTensor)
        return DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )


def refuse_parallelism(student: StoredModel, batch: int, processes: int) -> None:
    """Raises UserError: more processes than rows in a step, or than rows in a weight to share out. From headers alone."""
    if processes > batch:
        raise UserError(
            f"distil: {processes} processes and {batch} rows in a step: some would have none; set batch to {processes} at least, or a "
            "smaller worker.parallelism or processesPerPod"
        )
    shapes = ((t.name, t.shape) for stage in student.layout.stages() for t in stage.tensors if len(t.shape) == 2)
    name, shape = min(shapes, key=lambda found: found[1][0])
    if processes > shape[0] and not name.endswith("shared_expert_gate.weight"):
        raise UserError(
            f"distil: {processes} processes cannot share {name} of {shape[0]} rows; set worker.parallelism times processesPerPod to "
            f"{shape[0]} at most"
        )
