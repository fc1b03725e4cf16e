"""Modules that compute in this process with weights that lie in the broker's memory once for everybody.

from luna_broker.torch import load_attached, skeleton

with skeleton():
    unet = UNet2DConditionModel(**config)
load_attached(unet, "unet.safetensors", dtype=torch.float16)    # on a GPU: device="cuda"
unet(latent, timestep, context)
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike, fspath
from threading import get_ident
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from . import Client, ConnectionLost, InvalidTensor, LunaBrokerError, Unsupported, Weights, connect
from ._native import Attached
from .errors import refusal

__all__ = ["attached_weights", "load_attached", "skeleton"]

# What an error names of a long list; the rest is counted.
NAMED_KEYS = 8

CPU = torch.device("cpu")
META = torch.device("meta")

EVAL = "call module.eval() first; to train it, load it without load_attached"

# Stored buffers that forwards of torch's own modules write to in training mode: of norms, and of spectral norms.
WRITTEN_IN_TRAINING = frozenset(
    {"running_mean", "running_var", "num_batches_tracked", "_u", "_v", "weight_u", "weight_v"}
)

DTypes = torch.dtype | str | dict[str, torch.dtype | str | None]


def load_attached(
    module: Module,
    name_or_weights: str | PathLike[str] | Weights,
    *,
    client: Client | None = None,
    prefix: str = "",
    dtype: DTypes | None = None,
    device: str | torch.device | None = None,
    strict: bool = True,
    check: bool = True,
) -> Weights:
    """Gives `module` the tensors of attached weights in place of its own parameters and buffers, without a copy.

    Parameters may be on the meta device: see `skeleton`. What the module ties, stays tied. The parameters are frozen,
    as everybody shares them. Where anything does not fit, `InvalidTensor` names it; whatever is raised, the module has
    its own parameters and buffers as before.

    `name_or_weights`: what `Client.attach` takes, or gives. `client`: who attaches; `None` for one at the default
    address, which all such calls of this process share. `prefix`: what the keys of the module's tensors begin with in
    the weights; other keys are not looked at. `dtype`: element types that the broker is to convert to, as for
    `Client.attach`; the module must want the same. `device`: `"cpu"`, `"cuda"` or `"cuda:N"`, where the weights are to
    be; buffers on the CPU that are not among them are moved there, parameters elsewhere are refused. `None` for where
    the module is: in host memory if it is on the meta device, and buffers are left where they are. `strict`: whether
    the module and the weights must have the same keys; else what only one of them has is left alone, unless it is on
    the meta device. `check`: whether each call of the module asks the broker first, in some ten microseconds, whether
    the weights are still held, and raises `ConnectionLost` or `Stale` otherwise; `weights.reattach()` makes the same
    module good again. A module that is used by methods other than its forward checks nothing then: call
    `weights.check()`.

    Modules that keep running statistics, such as `BatchNorm2d`, write to them in training mode: then they, and each of
    their forwards later on, are refused with `InvalidTensor`; `module.eval()` is what they want. Of other modules that
    write to buffers of their own nothing is known here: on the CPU this process gets pages of its own, see
    `Weights.diverged_bytes`.

    Returns the weights, which live as long as the module does.
    """
    wanted = None if device is None else _usable(device)
    if isinstance(name_or_weights, Weights):
        if dtype is not None:
            raise TypeError("dtype: the weights are attached already; their types were chosen then")
        weights = name_or_weights
        if wanted is not None and weights.device != str(wanted):
            message = f"{weights.name} is on {weights.device} already, not on {wanted}; the module is as it was"
            raise refusal(InvalidTensor, message, f"attach it with device={str(wanted)!r}, or leave out device")
    else:
        where = str(wanted) if wanted else _device_of(module)

        def attach(by: Client) -> Weights:
            return by.attach(fspath(name_or_weights), dtype=dtype, device=where)

        weights = _by_default_client(attach) if client is None else attach(client)
    attached = weights._held()
    plan = _Plan(_slots(module), weights, prefix, wanted)
    plan.refuse_what_does_not_fit(strict)
    try:
        plan.assign()
        _audit(plan, attached)
    except BaseException:
        plan.take_back()
        raise
    _remember(module, weights, attached, check, plan)
    return weights


# By process, as a forked child's copy is its parent's session, and by the address that was the default then.
_DEFAULT_CLIENTS: dict[tuple[int, str | None], Client] = {}


def _by_default_client(attach: Callable[[Client], Weights]) -> Weights:
    key = (os.getpid(), os.environ.get("LUNA_BROKER"))
    # No lock, which a fork could leave locked: of two threads that are first, one drops its client.
    client = _DEFAULT_CLIENTS.get(key) or _DEFAULT_CLIENTS.setdefault(key, connect())
    try:
        return attach(client)
    except ConnectionLost:
        # Closed, or its broker is another one by now: either way a new one does, or says that nobody is there.
        if _DEFAULT_CLIENTS.get(key) is client:
            _DEFAULT_CLIENTS[key] = connect()
        return attach(_DEFAULT_CLIENTS[key])


def attached_weights(module: Module) -> list[Weights]:
    """The weights that `load_attached` gave to this very module, and that it still has.

    Those whose memory none of its parameters and buffers lies in any more, after `.to()`, `.half()` or what else gave
    it tensors of its own, are not among them. The module does not hold them from then on, or from its next forward.
    """
    for held in _HELD.get(module, []):
        _forget_unless_used(module, held.attached)
    return [held.weights for held in _HELD.get(module, []) if _witness(module, held.attached)]


@contextmanager
def skeleton() -> Iterator[None]:
    """Modules built in this block, by this thread, have parameters without memory, and buffers as always.

    Building them takes neither time nor memory for the weights; computed buffers, which are in no file, are there.
    """
    register, thread = Module.register_parameter, get_ident()
    # Of one parameter under two names one meta parameter is made: tied stays tied.
    made: Any = WeakTensorKeyDictionary()

    def register_without_memory(module: Module, name: str, parameter: Parameter | None) -> None:
        if get_ident() == thread and parameter is not None and parameter.device != META and not is_lazy(parameter):
            if parameter not in made:
                made[parameter] = Parameter(parameter.detach().to(META), requires_grad=parameter.requires_grad)
            parameter = made[parameter]
        register(module, name, parameter)

    Module.register_parameter = register_without_memory
    try:
        yield
    finally:
        Module.register_parameter = register


@dataclass
class _Slot:
    """A tensor of a module, and every place that it is found in: several, where the module ties them."""

    tensor: torch.Tensor
    # False for a buffer that no file has.
    is_stored: bool = False
    places: list[tuple[Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def is_movable(self) -> bool:
        """Whether it may be put on a GPU unasked: a buffer as modules are built with."""
        return self.tensor.device == CPU and not isinstance(self.tensor, Parameter)

    @property
    def shown(self) -> str:
        return " = ".join(self.names)


def _slots(module: Module) -> list[_Slot]:
    slots: dict[int, _Slot] = {}
    # Modules and tensors that come twice are looked at under each of their names.
    for path, owner in module.named_modules(remove_duplicate=False):
        for tensors, transient in ((owner._parameters, ()), (owner._buffers, owner._non_persistent_buffers_set)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    slot = slots.setdefault(id(tensor), _Slot(tensor))
                    slot.is_stored |= name not in transient
                    slot.places.append((owner, name))
                    slot.names.append(f"{path}.{name}" if path else name)
    return list(slots.values())


class _Plan:
    """Which tensor of the weights goes where; nothing is changed before all of it fits."""

    def __init__(self, slots: list[_Slot], weights: Weights, prefix: str, device: torch.device | None) -> None:
        self.prefix = prefix
        self.device = device
        self.weights = weights
        self.chosen: list[tuple[_Slot, torch.Tensor]] = []
        self.given: list[TensorWeakRef] = []
        self.missing: list[_Slot] = []
        self.left_on_meta: list[_Slot] = []
        self.to_move: list[_Slot] = []
        self.left_elsewhere: list[_Slot] = []
        self.untied: list[str] = []
        used: set[str] = set()
        for slot in slots:
            keys = [prefix + name for name in slot.names if slot.is_stored and prefix + name in weights]
            used.update(keys)
            if keys:
                first = weights[keys[0]]
                self.chosen.append((slot, first))
                self.untied += [f"{keys[0]} and {key}" for key in keys[1:] if not _same_bytes(first, weights[key])]
                continue
            if slot.is_stored:
                self.missing.append(slot)
            if slot.tensor.device == META:
                self.left_on_meta.append(slot)
            elif device not in (None, slot.tensor.device):
                (self.to_move if slot.is_movable else self.left_elsewhere).append(slot)
        self.unexpected = [key for key in weights if key.startswith(prefix) and key not in used]

    def refuse_what_does_not_fit(self, strict: bool) -> None:
        if self.untied:
            raise self._refusal(
                "the module ties what differs there",
                self.untied,
                "untie them in the module first: give each a Parameter of its own",
            )
        if strict and (self.missing or self.unexpected):
            raise self._keys_differ()
        if self.left_on_meta:
            raise self._refusal(
                "there is nothing for these, which would be left on the meta device",
                [slot.shown + ("" if slot.is_stored else " (a buffer that is computed)") for slot in self.left_on_meta],
                "build the module in luna_broker.torch.skeleton(), which computes buffers, or assign them before",
            )
        self._refuse("shapes differ", _shapes_differ, "build the module with the configuration that the weights are of")
        self._refuse(
            "element types differ, and nothing is converted silently",
            _dtypes_differ,
            "have the broker convert: dtype=… of the module; or convert the module before: module.to(dtype)",
        )
        writing = [
            f"{name} ({type(owner).__name__})"
            for slot, _ in self.chosen
            for (owner, attribute), name in zip(slot.places, slot.names, strict=True)
            if owner.training and _is_written_in_training(slot.tensor, attribute)
        ]
        if writing:
            raise self._refusal("in training mode it would write to what everybody shares", writing, EVAL)
        differ = [
            f"{slot.shown} ({slot.tensor.device} in the module, {tensor.device} attached)"
            for slot, tensor in self.chosen
            if slot.tensor.device not in (META, tensor.device) and not (self.device and slot.is_movable)
        ]
        differ += [f"{slot.shown} ({slot.tensor.device}, and not attached)" for slot in self.left_elsewhere]
        if differ:
            there = repr(self.weights.device)
            remedy = f"build it in luna_broker.torch.skeleton() and name device={there}, or move it first: .to({there})"
            raise self._refusal("devices differ", differ, remedy)

    def assign(self) -> None:
        moved = [(slot, slot.tensor.to(self.device)) for slot in self.to_move]
        for slot, tensor in moved:
            for owner, name in slot.places:
                setattr(owner, name, tensor)
        for slot, tensor in self.chosen:
            # An object of the module's own: it is gone when the module has it no more.
            new = tensor.detach()
            if isinstance(slot.tensor, Parameter):
                new = Parameter(tensor, requires_grad=False)
                # What libraries note about a parameter stays with it.
                vars(new).update(vars(slot.tensor))
            self.given.append(TensorWeakRef(new))
            for owner, name in slot.places:
                setattr(owner, name, new)

    def written_in_training(self) -> list[Module]:
        """The modules that would write to what is shared, were they in training mode."""
        owners = {
            id(owner): owner
            for slot, _ in self.chosen
            for owner, name in slot.places
            if _is_written_in_training(slot.tensor, name)
        }
        return list(owners.values())

    def take_back(self) -> None:
        """Gives the module what it had before `assign`, however far that came."""
        for slot in [*self.to_move, *(slot for slot, _ in self.chosen)]:
            for owner, name in slot.places:
                # By the way it came, for what a module notes elsewhere, as recurrent ones do; then whatever that did.
                with suppress(Exception):
                    setattr(owner, name, slot.tensor)
                tensors = owner._parameters if isinstance(slot.tensor, Parameter) else owner._buffers
                tensors[name] = slot.tensor

    def _keys_differ(self) -> LunaBrokerError:
        if not self.chosen and self.unexpected == list(self.weights):
            alike = _prefix_that_fits(self.missing, self.weights)
            remedy = f"prefix={alike!r} fits" if alike else "attach the weights of this module, or name their prefix"
            return self._refusal("there is no key of the module's", [slot.shown for slot in self.missing], remedy)
        parts = []
        if self.missing:
            parts.append(f"the weights lack {_listed([slot.shown for slot in self.missing])}")
        if self.unexpected:
            parts.append(f"the module lacks {_listed(self.unexpected)}")
        remedy = "attach the weights of this module, or pass strict=False to leave alone what only one of them has"
        return self._refusal("keys differ", parts, remedy)

    def _refuse(self, what: str, differ: Callable[[torch.Tensor, torch.Tensor], str | None], remedy: str) -> None:
        found = [(slot, differ(slot.tensor, tensor)) for slot, tensor in self.chosen]
        wrong = [f"{slot.shown} ({difference})" for slot, difference in found if difference]
        if wrong:
            raise self._refusal(what, wrong, remedy)

    def _refusal(self, what: str, keys: list[str], remedy: str) -> LunaBrokerError:
        message = f"{self.weights.name} does not fit the module: {what}: {_listed(keys)}; the module is as it was"
        return refusal(InvalidTensor, message, remedy)


def _is_written_in_training(tensor: torch.Tensor, name: str) -> bool:
    return name in WRITTEN_IN_TRAINING and not isinstance(tensor, Parameter)


def _shapes_differ(have: torch.Tensor, given: torch.Tensor) -> str | None:
    if is_lazy(have):
        return "of the module's, no shape is known before its first call"
    if have.shape == given.shape:
        return None
    return f"{list(have.shape)} in the module, {list(given.shape)} attached"


def _dtypes_differ(have: torch.Tensor, given: torch.Tensor) -> str | None:
    return None if have.dtype == given.dtype else f"{have.dtype} in the module, {given.dtype} attached"


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same bit for bit: numbers that are none are equal to themselves."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _prefix_that_fits(missing: list[_Slot], weights: Weights) -> str | None:
    name = missing[0].names[0] if missing else ""
    for key in weights:
        prefix = key.removesuffix(name)
        if name and prefix != key and all(any(prefix + n in weights for n in slot.names) for slot in missing):
            return prefix
    return None


def _listed(names: list[str]) -> str:
    rest = len(names) - NAMED_KEYS
    return ", ".join(names[:NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def _usable(device: str | torch.device) -> torch.device:
    """The device by its full name, if torch can use it."""
    remedy = "use cpu, or a GPU that torch.cuda.device_count() counts: cuda, cuda:N"
    try:
        named = torch.device(device)
    except RuntimeError:
        raise refusal(Unsupported, f"there is no device {device!r}", remedy) from None
    if named.type == "cpu":
        return CPU
    if named.type != "cuda":
        raise refusal(Unsupported, f"weights on device {named} are not supported", remedy)
    if not torch.cuda.is_available() or (named.index or 0) >= torch.cuda.device_count():
        raise refusal(Unsupported, f"torch finds no GPU {named} in this process", remedy)
    return torch.device("cuda", torch.cuda.current_device() if named.index is None else named.index)


def _device_of(module: Module) -> str | None:
    """The device that the module is on, as far as it is anywhere."""
    devices = {str(slot.tensor.device) for slot in _slots(module) if slot.is_stored and slot.tensor.device != META}
    return devices.pop() if len(devices) == 1 else None


def _audit(plan: _Plan, attached: Attached) -> None:
    """That the module really computes with the shared memory, found by looking at it again.

    A module may keep what it is given elsewhere, or a copy of it: then memory is not saved, and nobody would notice.
    """
    private = [
        name
        for slot, _ in plan.chosen
        for (owner, attribute), name in zip(slot.places, slot.names, strict=True)
        if not _lies_in(getattr(owner, attribute), attached)
    ]
    if private:
        message = f"the module made copies of what it was given, and has its own again: {_listed(private)}"
        raise refusal(LunaBrokerError, message, "load it without load_attached: nothing would be shared")


def _lies_in(tensor: torch.Tensor, attached: Attached) -> bool:
    return tensor.numel() == 0 or _starts_in(tensor, attached.span)


def _starts_in(tensor: torch.Tensor, span: tuple[int, int]) -> bool:
    try:
        return span[0] <= tensor.data_ptr() < span[1]
    except (RuntimeError, ValueError):
        # Made of other tensors, or not made yet: it has no memory.
        return False


_Place = tuple[weakref.ref[Module], str]


def _witness(module: Module, attached: Attached) -> _Place | None:
    """A place where the module has a tensor in the shared memory."""
    span = attached.span
    for owner in module.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and _starts_in(tensor, span):
                return weakref.ref(owner), name
    return None


def _bears_out(place: _Place, attached: Attached) -> bool:
    owner, name = place[0](), place[1]
    tensor = None if owner is None else owner._parameters.get(name, owner._buffers.get(name))
    return tensor is not None and _starts_in(tensor, attached.span)


class _Check:
    """Asks the broker before a module computes. A copy of the module has copies of the weights: it asks nothing."""

    def __init__(self, attached: Attached | None = None) -> None:
        self._attached = attached
        # Looking at one place is quick, at all of them is not.
        self._place: _Place | None = None

    def __call__(self, module: Module, arguments: object) -> None:
        if self._attached is None:
            return
        if self._place is None or not _bears_out(self._place, self._attached):
            self._place = _witness(module, self._attached)
        if self._place is None:
            _forget_unless_used(module, self._attached)
        else:
            self._attached.check()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Check, ()


class _OnlyInEval:
    """Refuses a forward that would write to shared statistics. A copy of the module has its own: it may."""

    def __init__(self, name: str = "", span: tuple[int, int] = (0, 0)) -> None:
        self._name = name
        self._span = span

    def __call__(self, module: Module, arguments: object) -> None:
        if not module.training:
            return
        written = [
            name
            for name, tensor in module._buffers.items()
            if name in WRITTEN_IN_TRAINING and tensor is not None and _starts_in(tensor, self._span)
        ]
        if written:
            message = f"{type(module).__name__} in training mode would write to {_listed(written)}, which is shared"
            raise refusal(InvalidTensor, f"{message} as part of {self._name}; nothing was computed", EVAL)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _OnlyInEval, ()


@dataclass
class _Held:
    """Weights that a module has, and what ends its questions about them."""

    weights: Weights
    # What stays when the dictionary is closed: the module has its tensors still.
    attached: Attached
    # The tensors that the module was given, while they are anywhere.
    given: list[TensorWeakRef]
    hooks: list[RemovableHandle]

    @property
    def is_used(self) -> bool:
        """Whether the module may have them yet: `torch.func.functional_call` takes them out for a while."""
        tensors = (tensor() for tensor in self.given)
        return any(tensor is not None and _starts_in(tensor, self.attached.span) for tensor in tensors)

    def stop_asking(self) -> None:
        for hook in self.hooks:
            hook.remove()


# The module has no attribute for them, as it would be copied with the module, weights and all.
_HELD: weakref.WeakKeyDictionary[Module, list[_Held]] = weakref.WeakKeyDictionary()


def _remember(module: Module, weights: Weights, attached: Attached, check: bool, plan: _Plan) -> None:
    for held in _HELD.get(module, []):
        if held.attached is attached or not _witness(module, held.attached):
            _forget(module, held)
    only_in_eval = _OnlyInEval(weights.name, attached.span)
    hooks = [writer.register_forward_pre_hook(only_in_eval) for writer in plan.written_in_training()]
    if check:
        hooks.append(module.register_forward_pre_hook(_Check(attached)))
    _HELD[module] = [*_HELD.get(module, []), _Held(weights, attached, plan.given, hooks)]


def _forget_unless_used(module: Module, attached: Attached) -> None:
    for held in _HELD.get(module, []):
        if held.attached is attached and not held.is_used:
            _forget(module, held)


def _forget(module: Module, held: _Held) -> None:
    held.stop_asking()
    _HELD[module] = [other for other in _HELD.get(module, []) if other is not held]
