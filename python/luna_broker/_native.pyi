"""The compiled client. Import its names from `luna_broker`."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, final, overload

import numpy as np
import numpy.typing as npt
import torch

from .weights import Weights

__version__: str

_DType = str | torch.dtype | type[np.generic] | np.dtype[Any]

class LunaBrokerError(Exception):
    """Base of every error of this package.

    The text says what happened, naming the input, and what was left intact. Failures without a
    class of their own (an operating system call refused, an executor that failed on valid input)
    are raised as this class.
    """

    @property
    def kind(self) -> str:
        """Name of the kind of failure, such as `"ModelNotFound"`; stable, fit for logs."""

    @property
    def remedy(self) -> str:
        """What to do about it; empty where nothing sensible can be said."""

class ConnectionLost(LunaBrokerError):
    """The broker is not there, went away during the call, or this client was closed.

    Results already held stay valid. Unless it was closed, the client connects again by itself on
    its next call.
    """

class Refused(LunaBrokerError):
    """The broker ended the negotiation: another user, another protocol version, a rung that was
    asked for by force and cannot be had."""

class Busy(LunaBrokerError):
    """A bounded queue is full. The request never entered it; it can be sent again later."""

class OutOfMemory(LunaBrokerError):
    """A byte budget or an allocator said no; what was allocated for the request was given back.

    Where torch is loaded this class derives from `torch.OutOfMemoryError` too, so that code which
    catches that one and falls back to tiles keeps working.
    """

class ModelNotFound(LunaBrokerError):
    """No model of that name, or no such file."""

class InvalidModel(LunaBrokerError):
    """The path exists but is nothing that can be used: a folder, a truncated file, a pickle
    checkpoint (which would run code and is never opened), a file without the part asked for."""

class InvalidTensor(LunaBrokerError):
    """A tensor does not fit the operation: its rank, a side, its channels or its element type.
    It was not sent."""

class Stale(LunaBrokerError):
    """Something refers to an earlier life: a restarted broker, a model file that was overwritten.
    Obtain it anew and send the request again."""

class Unsupported(LunaBrokerError):
    """Recognised, but nothing this build or device can do."""

class InUse(LunaBrokerError):
    """Somebody uses what the request would replace or take away. Nothing was changed."""

class Timeout(LunaBrokerError):
    """The deadline passed before the answer came. The client stays usable."""

class Cancelled(LunaBrokerError):
    """The request was taken back before it was done."""

class ShuttingDown(LunaBrokerError):
    """The broker is stopping and answers what is still queued with this."""

class ProtocolError(LunaBrokerError):
    """The peer broke the protocol. The connection was given up."""

class ConfigurationError(LunaBrokerError):
    """A setting is wrong: an address that cannot be read, a value out of range."""

@final
class Rung:
    """How tensors cross between this process and the broker for one device."""

    @property
    def device(self) -> str:
        """`"cpu"`, or the UUID of a GPU."""

    @property
    def rung(self) -> str:
        """Name of the rung: `"cuda-ipc"` and `"cuda-vmm"` (memory of the broker's GPU, no copy), `"peer"` (the same
        from another GPU, results copied once), `"shm"` (shared memory: no copy on the CPU), `"inline"` (bytes behind
        the frame)."""

    @property
    def reason(self) -> str:
        """Why this rung and no better one, as a sentence."""

    @property
    def order(self) -> Literal["events", "host"] | None:
        """How work on a GPU is kept in order: by events, or by waiting for the GPU on either side. `None` where no GPU
        memory is shared."""

    @property
    def pages(self) -> str | None:
        """How this process holds the memory that a GPU's tensors pass through on `"shm"`: `"page-locked"`, or why it is
        not. `None` before the first of them, and on other rungs."""

@final
class Session:
    """What the broker and this client agreed on. A reconnect replaces it."""

    @property
    def name(self) -> str:
        """Name of this client in the broker's status and logs."""

    @property
    def broker_version(self) -> str:
        """Version of the broker."""

    @property
    def rungs(self) -> list[Rung]:
        """One entry per device, with the reason for the choice."""

@final
class Call:
    """How one call went."""

    @property
    def mode(self) -> Literal["full", "tiled"] | None:
        """Whether it was run in one piece or in tiles; `None` for a UNet, which has one way."""

    @property
    def queued_s(self) -> float:
        """Seconds between the request's arrival at the broker and its start."""

    @property
    def run_s(self) -> float:
        """Seconds the model ran."""

    @property
    def bytes_copied_in(self) -> int:
        """Bytes this client copied to get the input across; 0 for a tensor born shared."""

    @property
    def step(self) -> dict[str, Any] | None:
        """Of a UNet, else `None`: `together` (requests that ran as one batch), `working_bytes`, `adapters` (what the
        model took up of each: `layers`, `kinds`, `unknown_keys`, the first `unknown` ones, `other_keys` about other
        parts), `cache` (`verdict`: "hit", or why the step was computed: "empty", "restarted", "control", "outside",
        "exhausted", "different"; and the `distance` that was measured; `None` without a block cache), and `run` (see
        `Run.report`)."""

    @property
    def bytes_copied_out(self) -> int:
        """Bytes this client copied to hand out the result; 0 where the result is a view."""

@final
class TextCall:
    """How one prompt was encoded."""

    @property
    def queued_s(self) -> float:
        """Seconds between the request's arrival at the broker and its start."""

    @property
    def run_s(self) -> float:
        """Seconds the text encoders ran."""

    @property
    def bytes_copied_in(self) -> int:
        """Bytes this client copied to get tokens across."""

    @property
    def bytes_copied_out(self) -> int:
        """Bytes this client copied to hand out the results; 0 where they are views."""

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """What the text encoders took up of each adapter, as `Run.adapters`."""

    @property
    def ignored(self) -> list[tuple[str, str]]:
        """Embeddings that the prompt names in vain, each with the reason; it was encoded without them."""

@final
class Clip:
    """Text encoders that live in the broker. Obtained from `Client.clip`; may be used from many threads, and by many
    processes at a time: each gets its turn.

    What is said of results and errors at `Vae` holds here too. Results are torch tensors where torch is loaded, else
    numpy arrays.
    """

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the text encoders, among them:

        `name`; `family` (`"clip-l"`, `"clip-h"`, `"clip-g"`, `"clip-l+g"`); `bytes` (of weights); and under `clip`:
        `files`, and `encoders`, each with `kind` (`"clip_l"`, `"clip_h"`, `"clip_g"`), `width`, `layers`, `tokens` (of
        a chunk) and `projection` (width of a projected pooled row, or `None`).
        """

    @property
    def last(self) -> TextCall:
        """How the last call through this object went; of several threads, whichever ended last."""

    def encode(
        self,
        text: str,
        text_g: str | None = None,
        skip: int | None = None,
        project: bool = True,
        loras: Sequence[tuple[str | PathLike[str], float]] | None = None,
        lora_mode: Literal["auto", "side", "merged"] = "auto",
        device: str | torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditioning [1, positions, width] and pooled row [1, width] of a prompt, float32, as ComfyUI makes them.

        `text`: `(word:1.2)` weighs, `embedding:name` is a file in the broker's `--embeddings` folders (`last.ignored`
        has those that could not be had), long prompts go on in further chunks of 77 positions. `text_g`: another text
        for CLIP-G; the shorter of both is filled up. `skip`: which block's result, counted from the end, 1 being the
        last; by default what the diffusion model was trained with. `project`: whether the pooled row is projected where
        the file has a projection. `device`: where the results go; the CPU by default.
        """

    def encode_tokens(
        self,
        tokens: dict[str, Sequence[Sequence[tuple[int | torch.Tensor | npt.NDArray[np.floating[Any]], float]]]],
        skip: int | None = None,
        project: bool = True,
        loras: Sequence[tuple[str | PathLike[str], float]] | None = None,
        lora_mode: Literal["auto", "side", "merged"] = "auto",
        device: str | torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `encode`, of tokens as ComfyUI's tokenizers give them: for each encoder (`"clip_l"` or `"l"`, ...) chunks
        of tuples of a token, or a vector as wide as the encoder, and its weight; what is behind these is not looked at.
        `loras`, `lora_mode`: as in a call of a `Unet`.
        """

@final
class DeviceTensor:
    """A tensor of the broker's in memory of a GPU, for libraries that speak DLPack. What torch tensors and numpy
    arrays are given back as is of their own kind; numpy knows no GPU, so it gets this."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""

    @property
    def dtype(self) -> str:
        """Name of the element type."""

    @property
    def device(self) -> str:
        """`"cuda:N"`, as this process numbers its GPUs."""

    def tobytes(self) -> bytes:
        """The bytes, copied to host memory once the broker is done with them."""

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """Work enqueued on `stream` afterwards comes behind the broker's; -1 leaves the order to the consumer."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """Device type and ordinal."""

@final
class Unet:
    """A UNet that lives in the broker. Obtained from `Client.unet`; may be used from many threads, and by many
    processes at a time: each gets its turn.

    What is said of tensors and errors at `Vae` holds here too.
    """

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the model, among them:

        `name`; `family` (`"sd15"`, `"sdxl"`, ..., `"generic"`); `bytes` (of weights); and under `unet`: `variant`
        (`"plain"`, `"inpaint"`, `"instruct"`, `"other"`), `prediction` (`"eps"`, `"v"`, `"edm"`, `"v-edm"`),
        `zero_terminal_snr`, `in_channels`, `context_width`, `vector_width` (`None` where it takes no `y`).
        """

    @property
    def last(self) -> Call:
        """How the last call through this object went; of several threads, whichever ended last."""

    @overload
    def __call__(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        control: Mapping[str, Sequence[torch.Tensor | None]] | None = None,
        loras: Sequence[tuple[str | PathLike[str], float]] | None = None,
        lora_mode: Literal["auto", "side", "merged"] = "auto",
        device: str | torch.device | None = None,
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self,
        x: npt.NDArray[np.floating[Any]],
        timesteps: npt.NDArray[np.floating[Any]],
        context: npt.NDArray[np.floating[Any]],
        y: npt.NDArray[np.floating[Any]] | None = None,
        control: Mapping[str, Sequence[npt.NDArray[np.floating[Any]] | None]] | None = None,
        loras: Sequence[tuple[str | PathLike[str], float]] | None = None,
        lora_mode: Literal["auto", "side", "merged"] = "auto",
        device: str | torch.device | None = None,
    ) -> npt.NDArray[np.floating[Any]]:
        """The network's output for one step, in `x`'s element type and size; `info["unet"]["prediction"]` says what it
        means.

        `x`: [B, C, h, w], scaled as samplers do, with what an inpaint or instruct model takes behind the latent's
        channels. `timesteps`: [B], 0..999 in training, fractions allowed. `context`: [B, tokens, width], the encoded
        prompt. `y`: [B, width] for models with a `vector_width`. `control`: tensors or `None` in lists under `"input"`,
        `"middle"` and `"output"`, as ComfyUI passes what a ControlNet gives. `device`: where the result goes; where `x`
        is unless it says otherwise.

        `loras`: adapters with their strengths, applied in order: names in the broker's folders, or paths. The first
        call waits until they were read and put together; nobody else does, and nothing of the model is changed.
        `lora_mode`: "side" (beside the layers, where that can be), "merged" (private copies of the weights that they
        change), or what is cheaper for each layer; results differ by rounding only, so name a mode to repeat one. A
        file that is not there is `ModelNotFound`, one that does not fit `InvalidModel`; keys that name nothing are
        told in `last.step`.
        """

    def run(
        self,
        loras: Sequence[tuple[str | PathLike[str], float]] | None = None,
        fb_cache: float | Mapping[str, float | int | None] | None = None,
        sigmas: Sequence[float] | None = None,
        lora_mode: Literal["auto", "side", "merged"] = "auto",
    ) -> Run:
        """Opens a sampling run.

        `loras`, `lora_mode`: as in a call; the first-time wait is here. `fb_cache`: leaves out the rest of a forward
        whose first block changes its input by less than a `threshold` otherwise than before (0.1 to 0.2 is usual):
        that number, or a dictionary with `threshold`, `start` and `end` (shares of the run, 0 and 1) and `max_hits`
        (steps left out in a row). `sigmas`: the run's noise levels, one per step and one behind them; with them
        `start` and `end` are shares of its steps, without of the model's 1000 timesteps.
        """

    def prefetch(
        self,
        loras: Sequence[tuple[str | PathLike[str], float]],
        lora_mode: Literal["auto", "side", "merged"] = "auto",
    ) -> list[dict[str, Any]]:
        """Has the broker read adapters and put them together now, instead of with the first call that names them; what
        the model takes up of each."""

class Run:
    """One sampling run of a UNet: adapters, a block cache, and conditionings that cross once. Obtained from `Unet.run`,
    also as a context manager.

    After a lost connection it goes on by itself with a step that brings its `context` again; one that does not is
    `Stale`.
    """

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """What the model took up of each adapter: `name`, `layers`, `kinds`, `unknown_keys`, the first `unknown` ones,
        `other_keys`."""

    @property
    def report(self) -> dict[str, Any]:
        """The run until now: `steps`, `hits` (steps left out), mean `computed_s` and `hit_s`, and `speed_up`: how many
        times as long it would have taken without its block cache."""

    @property
    def last(self) -> Call:
        """How the last step through this object went."""

    @overload
    def __call__(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: Mapping[str, Sequence[torch.Tensor | None]] | None = None,
        conds: Sequence[int] = (0,),
        device: str | torch.device | None = None,
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self,
        x: npt.NDArray[np.floating[Any]],
        timesteps: npt.NDArray[np.floating[Any]],
        context: npt.NDArray[np.floating[Any]] | None = None,
        y: npt.NDArray[np.floating[Any]] | None = None,
        control: Mapping[str, Sequence[npt.NDArray[np.floating[Any]] | None]] | None = None,
        conds: Sequence[int] = (0,),
        device: str | torch.device | None = None,
    ) -> npt.NDArray[np.floating[Any]]:
        """One step, as `Unet` runs it.

        `conds`: numbers of the caller's own for the conditionings that share the rows evenly, in their order: [0, 1]
        for rows of the prompt, then as many of the negative one. `context` and `y` may be left out once they were
        sent for each of them; what is sent anew replaces it. A cond that was never sent is `InvalidTensor`.
        """

    def close(self) -> None:
        """Ends the run; later steps are `Stale`."""

    def __enter__(self) -> Run: ...
    def __exit__(self, *_raised: object) -> None: ...

class Vae:
    """A VAE that lives in the broker. Obtained from `Client.vae`; may be used from many threads.

    Tensors may have any strides; float16, bfloat16 and float32 are accepted. An input that does
    not lie in shared memory already (see `Client.empty`) is copied there once. A result is a view
    on shared memory: writable, not shared with any other result, given back when the last view of
    it is dropped, valid after the client was closed and after the broker is gone.

    Every call can raise `InvalidTensor`, `OutOfMemory`, `Busy`, `Timeout`, `Stale`,
    `ShuttingDown` and `ConnectionLost`.
    """

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the model, among them:

        `name`; `family` (`"autoencoder-kl"`, `"taesd"`, ...); `latent_channels`; `ratio` (pixels
        per latent element in each direction); `bytes` (of weights).
        """

    @property
    def last(self) -> Call:
        """How the last call through this object went; of several threads, whichever ended last."""

    @overload
    def decode(self, latent: torch.Tensor, device: str | torch.device | None = None) -> torch.Tensor: ...
    @overload
    def decode(
        self, latent: npt.NDArray[np.floating[Any]], device: str | torch.device | None = None
    ) -> npt.NDArray[np.float32]:
        """The image of a latent.

        `latent`: [N, C, h, w], unscaled, C as in `info["latent_channels"]`.
        Returns float32 [N, h * ratio, w * ratio, 3] in 0..1, on the device the latent came from unless
        `device` names another: `"cpu"`, `"cuda"`, `"cuda:N"`. A torch tensor on a GPU is copied once, on torch's
        current stream, and the result is a view that this stream may use at once. Where the byte budget of the broker
        does not allow the call in one piece, it is run in tiles; `last.mode` tells.
        """

    @overload
    def encode(self, image: torch.Tensor, device: str | torch.device | None = None) -> torch.Tensor: ...
    @overload
    def encode(
        self, image: npt.NDArray[np.floating[Any]], device: str | torch.device | None = None
    ) -> npt.NDArray[np.float32]:
        """The latent of an image: the mean of the posterior, unscaled.

        `image`: [N, H, W, 3] in 0..1. Sides that are no multiple of `info["ratio"]` are cropped to
        one around the centre. Returns float32 [N, C, H // ratio, W // ratio].
        """

    @overload
    def decode_tiled(
        self,
        latent: torch.Tensor,
        tile_x: int = 64,
        tile_y: int = 64,
        overlap: int = 16,
        device: str | torch.device | None = None,
    ) -> torch.Tensor: ...
    @overload
    def decode_tiled(
        self,
        latent: npt.NDArray[np.floating[Any]],
        tile_x: int = 64,
        tile_y: int = 64,
        overlap: int = 16,
        device: str | torch.device | None = None,
    ) -> npt.NDArray[np.float32]:
        """As `decode`, always in tiles: three passes with tiles of different proportions, averaged.

        `tile_x`, `tile_y`, `overlap`: columns, rows and common border, in latent elements.
        """

    @overload
    def encode_tiled(
        self,
        image: torch.Tensor,
        tile_x: int = 512,
        tile_y: int = 512,
        overlap: int = 64,
        device: str | torch.device | None = None,
    ) -> torch.Tensor: ...
    @overload
    def encode_tiled(
        self,
        image: npt.NDArray[np.floating[Any]],
        tile_x: int = 512,
        tile_y: int = 512,
        overlap: int = 64,
        device: str | torch.device | None = None,
    ) -> npt.NDArray[np.float32]:
        """As `encode`, always in tiles: three passes with tiles of different proportions, averaged.

        `tile_x`, `tile_y`, `overlap`: columns, rows and common border, in pixels.
        """

@final
class Attached:
    """What `luna_broker.Weights` is made of: a hold on weights in the broker's memory."""

    @property
    def name(self) -> str:
        """What they were asked for by."""

    @property
    def digest(self) -> str:
        """What the tensors contain, in hexadecimal digits."""

    @property
    def size_bytes(self) -> int:
        """Bytes of shared memory that they lie in."""

    @property
    def device(self) -> str:
        """`"cpu"` or `"cuda:N"`."""

    @property
    def span(self) -> tuple[int, int]:
        """First address of the memory, and the one behind it."""

    @property
    def diverged_bytes(self) -> int | None:
        """Bytes of pages that this process has to itself because it wrote to them."""

    def tensors(self) -> dict[str, Any]:
        """All tensors by key, made anew: torch's where torch is loaded, else numpy's."""

    def check(self) -> None:
        """Raises unless the broker counts the weights as held."""

    def reattach(self, progress: Callable[[int, int], object] | Literal[False] | None = None) -> None:
        """Puts the same weights of the broker's behind the same addresses."""

@final
class Permit:
    """A turn in one of the broker's lanes. Obtained from `Client.permit`; held inside a `with` block.

    It ends with the block, with the process, and at the latest after the broker's `--permit-seconds`: see
    `Client.permit`.
    """

    def __enter__(self) -> Permit:
        """Waits for the turn. Raises `OutOfMemory`, `Busy`, `Timeout`, `Stale`, `ConnectionLost`."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

@final
class Client:
    """A connection to a broker. Obtained from `connect`; may be used from many threads.

    A client whose broker was restarted connects again by itself on its next call. As a context
    manager it is closed on leaving the block.
    """

    @property
    def session(self) -> Session:
        """What was agreed on with the broker: name, version, and the rung per device."""

    def vae(self, name: str) -> Vae:
        """The VAE of that name or path, loaded by the broker if it is not yet.

        Raises `ModelNotFound`, `InvalidModel`, `Unsupported`, `OutOfMemory`.
        """

    def unet(self, name: str | PathLike[str]) -> Unet:
        """The UNet of that name or path, loaded by the broker with its first step.

        Raises `ModelNotFound`, `InvalidModel`, `Unsupported` (a structure that the broker does not run, named).
        """

    def clip(self, *names: str | PathLike[str]) -> Clip:
        """The text encoders in the files of these names or paths as one set, in any order: a checkpoint, or a file each
        for CLIP-L and CLIP-G. Loaded by the broker with their first prompt.

        Raises `ModelNotFound`, `InvalidModel`, `Unsupported` (encoders that do not go together).
        """

    def attach(
        self,
        name: str | PathLike[str],
        dtype: _DType | dict[str, _DType | None] | None = None,
        device: str | torch.device | None = None,
        progress: Callable[[int, int], object] | Literal[False] | None = None,
        timeout: float | None = None,
    ) -> Weights:
        """All tensors of a safetensors file, or of a published set, as views on memory that exists once.

        The broker loads a file with the first request for it; later ones, by whatever process, take what is there.

        `name`: a path, a name the broker knows, or that of a published set. `dtype`: what floating-point tensors are
        converted to, rounding to the nearest as torch does; a dictionary says it by the beginnings of keys, of which
        the longest that fits counts and `None` leaves a tensor as it is stored: `{"": torch.float16, "vae.": None}`.
        Integers and booleans are never converted. `device`: `"cuda:N"` for memory of a GPU. `progress`: a function of
        (bytes done, bytes in all), called a few times a second; what it raises ends the call. `None` draws a bar if
        stderr is a terminal and loading takes longer than half a second, `False` draws nothing. `timeout`: seconds;
        `None` for the client's.

        A published set is converted, and put onto a GPU, with the first request for that; what comes of it exists once,
        is published under the same name, and stays where the set it was made of gives way to others.

        Raises `ModelNotFound`, `InvalidModel`, `OutOfMemory`, `Unsupported` (besides, an element type nothing is
        converted to, and a session that shares no memory with the broker), `Stale` (weights of that name are held here
        that were unloaded by force: reattach or drop them first), `Timeout`.
        """

    def publish(self, name: str, tensors: Mapping[str, Any], timeout: float | None = None) -> Weights:
        """Hands tensors to the broker, for any process of this user to attach as `name`; returns their views.

        torch tensors and parameters, on the CPU or on a GPU, and numpy arrays are copied into the broker's memory once,
        row by row, whatever their strides; with the views in their place, the caller's may go. What the broker has
        already is not sent. Nobody may write to the tensors meanwhile.

        They lie in host memory, also those that come from a GPU, in the element types that they have. `attach` gives
        them on the broker's GPU or in other types where that is asked for.

        Raises `InUse` where `name` is a file's, or that of other tensors that somebody has attached; `InvalidTensor`,
        `OutOfMemory`, `Unsupported`.
        """

    def of(self, service: str) -> Client:
        """A client of the broker that runs a service's models, for what is not about models: `status`, `attach`, ...

        It shares this client's connection. Raises `Unsupported` for a service that no broker was named for.
        """

    def register(self, name: str, info: Mapping[str, Any]) -> None:
        """Has a model listed that this process has loaded itself, so that others see in `models()` and `status()` where
        memory goes. The broker does nothing else with it.

        `info`: `service` (`"vae"`, `"unet"`, ...), and where wanted `family`, `bytes` and `device`. Another model of
        that name takes its place; it is listed until the session ends, and after a restart of the broker no more.

        Raises `ConfigurationError` for another key and for a service that there is not.
        """

    def permit(self, service: Literal["vae"], bytes: int = 0, timeout: float | None = None) -> Permit:
        """A turn for work that this process does itself, with attached weights: `with client.permit("vae", bytes=n):`

        Of all processes that ask, and of the calls that the broker runs, one at a time has the lane, in the order in
        which they came. `bytes`: working memory that is going to be used; more than `--vae-budget` is refused with
        `OutOfMemory`, and is for tiles. `timeout`: seconds to wait for the turn; `None` for the client's.

        A permit that is kept for longer than the broker's `--permit-seconds` expires: the lane goes on, and from then
        others work at the same time. Nobody tells the block that holds it, and leaving it raises nothing; the broker's
        log has a warning.
        """

    def header(self, name: str | PathLike[str]) -> dict[str, tuple[str, list[int]]]:
        """Element type and shape of each tensor in a safetensors file, or in a published set, by key.

        The broker reads a file's header for it and loads nothing; a session that shares no memory can ask too. Element
        types are named as torch does: `"float16"`, `"float8_e4m3fn"`, ...

        Raises `ModelNotFound`, `InvalidModel`, and `Unsupported` for an element type that there is no name for.
        """

    def verify(self, name: str | PathLike[str]) -> list[dict[str, Any]]:
        """What weights contain now beside what they contained when they were loaded or published.

        One dictionary for each set of that name: `name`, `device`, `bytes`, and the digests `expected` and `found`.
        Raises `ModelNotFound` for weights that nobody has attached since the broker started.
        """

    @overload
    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: str | torch.device | None = None
    ) -> torch.Tensor: ...
    @overload
    def empty(self, shape: Sequence[int], dtype: type[np.generic], device: None = None) -> npt.NDArray[Any]: ...
    @overload
    def empty(self, shape: Sequence[int], dtype: type[np.generic], device: str) -> npt.NDArray[Any] | DeviceTensor:
        """A writable tensor in shared memory, on the CPU or on the GPU `device`; its content is undefined.

        What is written into it reaches the broker without a copy. It may be used for any number
        of calls and must not be changed while one of them runs. Raises `OutOfMemory`.
        """

    def status(self) -> dict[str, Any]:
        """What the broker is doing, among it `sessions`: a list, each with `name` and `leases`; and
        `weights`: a list, each with `names`, `bytes`, `saved_bytes` and `holders`, each with the `diverged_bytes` that
        it wrote to."""

    def metrics(self) -> str:
        """The broker's numbers for monitoring, in the text format of OpenMetrics, which Prometheus reads. Among them:
        `luna_broker_sessions` by device, rung in use and reason, and `luna_broker_rung_failures_total`."""

    def models(self) -> list[dict[str, Any]]:
        """The models the broker knows, each with at least its `name`."""

    def load(self, name: str) -> None:
        """Has the broker load a model now, so that the first call need not wait for it.

        Raises `ModelNotFound`, `InvalidModel`, `Unsupported`, `OutOfMemory`.
        """

    def unload(self, name: str | PathLike[str], force: bool = False) -> None:
        """Has the broker give up the memory of a model, and of weights of that name. The next call loads them again.

        Weights that somebody has attached stay and `InUse` is raised. With `force` they go: the tensors stay readable
        for those who have them, whose next `check` or permit raises `Stale`.

        Raises `ModelNotFound`, `InUse`.
        """

    def ping(self) -> float:
        """Seconds that a request which does nothing took, there and back."""

    def close(self) -> None:
        """Ends the session. Results already held stay valid. Closing twice is harmless.

        Every later call through this client or its models raises `ConnectionLost`.
        """

    def __enter__(self) -> Client: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

def sdxl_vector(
    pooled: torch.Tensor,
    original: tuple[float, float],
    crop: tuple[float, float] = (0, 0),
    target: tuple[float, float] | None = None,
    aesthetic: float | None = None,
) -> torch.Tensor:
    """The vector `y` that SDXL takes beside the prompt: pooled rows [N, width], behind each its sizes as waves.

    Sizes are (height, width) in pixels: `original` of the picture that the training picture was made of, `crop` what
    was cut off at the top and at the left, `target` of the picture asked for (`original` by default). With `aesthetic`
    (6 for what is wanted, 2.5 for what is not) it is the vector of the refiner, which has no target. numpy arrays in
    give numpy arrays out.
    """

def connect(
    address: str | PathLike[str] | Mapping[str, str | PathLike[str]] | None = None,
    timeout: float | None = None,
    name: str | None = None,
    check: Callable[[], object] | None = None,
) -> Client:
    """Connects to a broker on this machine, or to one for each service.

    `address`: path of its socket; `None` means `$LUNA_BROKER`, else the default socket of this
    user. Where services have brokers of their own: `{"vae": path, "unet": path}`, or the text
    `vae=PATH,unet=PATH`, also in `$LUNA_BROKER`. Models are then looked for at the broker of their service; `models`,
    `load`, `unload` and `close` concern all brokers, and everything else the one that is named first, of a dictionary
    the first in alphabetical order. `client.of("vae")` is the client of a certain one.
    `timeout`: seconds that connecting, and later each call, may wait for the broker; `None`
    means the default of the client. `name`: how this client appears in the broker's status and
    logs; `None` means one made of the process id. `check`: called about ten times a second while a call
    of this client that takes its time waits (steps, prompts, VAE calls, `attach`, `publish`, `load`, permits); what it
    raises takes the request back and is raised. It may use this client itself.

    The client is of this process: in a forked child its calls raise `ConnectionLost`; the child connects for itself.

    Raises `ConnectionLost` if nobody listens there, `Refused`, `Timeout`, `ConfigurationError`.
    """

@final
class Diagnosis:
    """What this process finds on its way to a broker. As text: a line for each finding, remedies below."""

    @property
    def findings(self) -> list[dict[str, str]]:
        """One dictionary for each thing that was looked at: `check`, `verdict`, `found`, `remedy`."""

    @property
    def exit_code(self) -> int:
        """0 where a client in this process could work, else an exit code of `luna-broker --help`."""

def diagnose(address: str | PathLike[str] | None = None) -> Diagnosis:
    """Looks at everything between this process and a broker; `luna_broker.doctor` gives its findings."""
