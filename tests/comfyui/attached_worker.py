"""A process with ComfyUI's code that attaches a checkpoint, uses it, and prints what it found out about its memory.

`attached_worker.py COMFYUI BROKER CHECKPOINT LORA`: facts as JSON on stdout. Between reading a line of its input and
the next it does one thing: see `main`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any


def main(_checkout: str, address: str, checkpoint: str, lora: str) -> None:
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    worker = Worker(address, checkpoint, lora)
    answer(worker.load())
    for line in sys.stdin:
        with torch.inference_mode():
            answer(getattr(worker, line.strip())())


def answer(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


class Worker:
    def __init__(self, address: str, checkpoint: str, lora: str) -> None:
        self._address, self._checkpoint, self._lora = address, checkpoint, lora

    def load(self) -> dict[str, Any]:
        """Attaches, and looks at where parameters lie."""
        from luna_broker.comfyui import loading
        from luna_broker.comfyui.attached.audit import audit

        loaded = loading.load("checkpoint", [self._checkpoint], "attached", "error", self._address)
        self.model, self.clip, self.vae = loaded.model, loaded.clip, loaded.vae
        (self.weights,) = self.model.holding.renewal.weights
        self.span = self.weights._held().span
        parts = {"unet.": self.model.model, "clip.": self.clip.cond_stage_model, "vae.": self.vae.first_stage_model}
        self.addresses = self._addresses()
        found = audit(parts, [self.span])
        return {
            "shared": found.shared_bytes,
            "expected": found.expected,
            "private": found.private,
            "mode": loaded.choice.mode.value,
            "accounted": self.model.model_size() + self.clip.patcher.model_size() + self.vae.patcher.model_size(),
        }

    def plain(self) -> dict[str, Any]:
        """Encodes, samples, decodes."""
        return self._paint(self.model, self.clip)

    def adapted(self) -> dict[str, Any]:
        """The same with a LoRA."""
        model, clip = self._with_lora()
        facts = self._paint(model, clip)
        patched = {**model.patches, **clip.patcher.patches}
        holding = model.holding
        facts.update(
            patched_bytes=sum(self._bytes(model, key) for key in model.patches),
            patched=len(patched),
            accounted=model.model_size(),
            loaded=model.loaded_size(),
            views=len(holding.views),
            backup_is_shared=all(self._is_shared(kept.weight) for kept in model.backup.values()),
            untouched=self._untouched(model),
        )
        return facts

    def adapted_for_itself(self) -> dict[str, Any]:
        """The same where merged weights are not shared; then some of it is given back."""
        model, clip = self._with_lora()
        publish, find = model.holding.sets.publish, model.holding.sets.find
        model.holding.sets.publish = lambda *_: {}
        model.holding.sets.find = lambda *_: {}
        facts = self._paint(model, clip)
        facts.update(accounted=model.model_size(), loaded=model.loaded_size())
        facts["freed"] = model.partially_unload(model.offload_device, facts["loaded"] // 2)
        facts["left"] = model.loaded_size()
        model.holding.sets.publish, model.holding.sets.find = publish, find
        return facts

    def hooked(self) -> dict[str, Any]:
        """The same with a LoRA on one prompt alone."""
        from comfy.hooks import create_hook_lora
        from comfy_extras.nodes_hooks import SetClipHooks

        hook = create_hook_lora(self._lora_tensors(), 0.9, 0.7)
        (clip,) = SetClipHooks().apply_hooks(self.clip, True, False, hook)
        return self._paint(self.model, clip, self.clip)

    def again(self) -> dict[str, Any]:
        """Whether weights are counted as held, after whatever became of the broker."""
        held = self.model.holding.renewal.renew()
        return {"held": held, "same_addresses": self._addresses() == self.addresses}

    def waits(self) -> dict[str, Any]:
        """How long a decode takes while another session has the VAE lane for a second."""
        import luna_broker
        import torch

        other = luna_broker.connect(self._address)
        has_turn = threading.Event()

        def hold() -> None:
            with other.permit("vae"):
                has_turn.set()
                time.sleep(1.0)

        holder = threading.Thread(target=hold)
        holder.start()
        has_turn.wait()
        began = time.monotonic()
        self.vae.decode(torch.zeros(1, 4, 8, 8))
        took = time.monotonic() - began
        holder.join()
        return {"took": took}

    def _with_lora(self) -> tuple[Any, Any]:
        import comfy.sd

        return comfy.sd.load_lora_for_models(self.model, self.clip, self._lora_tensors(), 0.8, 0.6)

    def _lora_tensors(self) -> dict[str, Any]:
        import comfy.utils

        return dict(comfy.utils.load_torch_file(self._lora, safe_load=True))

    def _paint(self, model: Any, clip: Any, negative: Any = None) -> dict[str, Any]:
        import nodes
        import torch

        prompts = [nodes.CLIPTextEncode().encode(each, "a house")[0] for each in (clip, negative or clip)]
        latent = {"samples": torch.zeros(1, 4, 8, 16)}
        sampled = nodes.common_ksampler(model, 7, 2, 4.0, "euler", "normal", *prompts, latent)[0]["samples"]
        image = self.vae.decode(sampled)
        return {
            "image": [float(image.mean()), float(image.std())],
            "latent": float(sampled.abs().sum()),
            "diverged": self._diverged(),
        }

    def _diverged(self) -> int | None:
        """Bytes of shared memory that this process wrote to; nobody can tell without a broker."""
        from luna_broker import ConnectionLost

        with contextlib.suppress(ConnectionLost):
            return self.weights.diverged_bytes
        return None

    def _addresses(self) -> list[int]:
        parts = (self.model.model, self.clip.cond_stage_model, self.vae.first_stage_model)
        return [parameter.data_ptr() for part in parts for parameter in part.parameters()]

    def _is_shared(self, tensor: Any) -> bool:
        return self.span[0] <= tensor.data_ptr() < self.span[1]

    def _untouched(self, model: Any) -> bool:
        """Whether all weights of the UNet that no LoRA is about lie where they lay."""
        named = model.model.diffusion_model.named_parameters(prefix="diffusion_model")
        return all(self._is_shared(parameter) for name, parameter in named if name not in model.patches)

    def _bytes(self, model: Any, key: str) -> int:
        import comfy.utils

        weight = comfy.utils.get_attr(model.model, key)
        return int(weight.numel() * weight.element_size())


if __name__ == "__main__":
    # Instead of this folder, whose comfy.py is another.
    sys.path[0] = sys.argv[1]
    sys.path.append(str(Path(__file__).resolve().parents[2] / "python"))
    main(*sys.argv[1:])
