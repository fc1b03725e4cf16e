"""The network of a remote model, as ComfyUI's BaseModel calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from luna_broker import Client
from luna_broker.comfyui.remote import refusals
from luna_broker.comfyui.remote.runs import Runs, Stack
from luna_broker.comfyui.remote.stacks import Stacks, check
from luna_broker.comfyui.remote.weights import Described, FileWeights

PREFIX = "diffusion_model."


class RemoteUNet(Described):
    """Stands for a UNet of the broker's. Its forward is a request."""

    dtype: torch.dtype

    def __init__(self, client: Client, unet: Any, weights: FileWeights, dtype: torch.dtype) -> None:
        """`unet`: a `luna_broker.Unet` of `client`. `dtype`: of what is sent."""
        super().__init__(weights, dtype, PREFIX)
        self.stacks = Stacks(client, weights, dtype)
        self.runs = Runs(unet, check)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        # Within the whole model's it is about names; who asks for this module's alone wants to have the weights.
        if destination is None:
            raise refusals.reading("The UNet's weights")
        return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: Mapping[str, Sequence[torch.Tensor | None]] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """As UNetModel's. What else ComfyUI passes, for ControlNets and for video, is not for this network."""
        options = {} if transformer_options is None else transformer_options
        refusals.options(options)
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._request, self, wrappers)
        return executor.execute(x, timesteps, context, y, control, options, **ignored)

    def _request(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        control: Mapping[str, Sequence[torch.Tensor | None]] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        options = transformer_options or {}
        # The first to see a step's options are wrappers, which may add patches.
        refusals.options(options)

        def step(stack: Stack) -> torch.Tensor:
            return self.runs.step(stack, x, timesteps, context, y, control, options)

        return self.stacks.ask(step)
