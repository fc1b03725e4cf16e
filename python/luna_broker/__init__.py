"""One broker process holds the diffusion models of a machine; this is how a worker uses them.

    import luna_broker

    client = luna_broker.connect()              # $LUNA_BROKER, else this user's default socket
    vae = client.vae("sdxl-vae.safetensors")    # a name the broker knows, or a path
    image = vae.decode(latent)                  # torch [N, C, h, w] to [N, H, W, 3] in 0..1
    latent = vae.encode(image)                  # numpy arrays in give numpy arrays out
    unet = client.unet("sdxl.safetensors")
    clip = client.clip("sdxl.safetensors")      # or the separate files: client.clip("clip_l...", "clip_g...")
    context, pooled = clip.encode("a photo of a (cat:1.2)")
    y = luna_broker.sdxl_vector(pooled, original=(1024, 1024))
    eps = unet(x, timesteps, context, y=y)      # one step, run by the broker; x's element type and size
    with unet.run(loras=[("style.safetensors", 0.8)], fb_cache=0.1) as run:     # one sampling run
        eps = run(x, timesteps, context, conds=[0, 1])  # the context crosses once; later it is left out
    weights = client.attach("unet.safetensors", dtype=torch.float16)    # {key: tensor}, once on this machine

`luna_broker.torch.load_attached` gives such weights to a module, which computes in this process.

Results are views on memory shared with the broker: nothing is copied, and dropping the last view
gives the memory back. A client may be used from many threads. Every error is a `LunaBrokerError`
whose class says what kind it is and whose `remedy` says what to do about it.
"""

from os import PathLike

from . import _native
from ._native import (
    Busy,
    Call,
    Cancelled,
    Client,
    Clip,
    ConfigurationError,
    ConnectionLost,
    DeviceTensor,
    InUse,
    InvalidModel,
    InvalidTensor,
    LunaBrokerError,
    ModelNotFound,
    Permit,
    ProtocolError,
    Refused,
    Run,
    Rung,
    Session,
    ShuttingDown,
    Stale,
    TextCall,
    Timeout,
    Unet,
    Unsupported,
    Vae,
    __version__,
    connect,
    sdxl_vector,
)
from .weights import Weights

__all__ = [
    "Busy",
    "Call",
    "Cancelled",
    "Client",
    "Clip",
    "ConfigurationError",
    "ConnectionLost",
    "DeviceTensor",
    "InUse",
    "InvalidModel",
    "InvalidTensor",
    "LunaBrokerError",
    "ModelNotFound",
    "OutOfMemory",
    "Permit",
    "ProtocolError",
    "Refused",
    "Run",
    "Rung",
    "Session",
    "ShuttingDown",
    "Stale",
    "TextCall",
    "Timeout",
    "Unet",
    "Unsupported",
    "Vae",
    "Weights",
    "__version__",
    "connect",
    "doctor",
    "sdxl_vector",
]


def doctor(address: str | PathLike[str] | None = None) -> list[dict[str, str]]:
    """What this process finds on its way to the broker at `address`, and what to do about what it does not find.

    One dictionary for each thing that was looked at: `check`, `verdict` ("ok", "note" where work goes on with less,
    "fail"), `found`, and `remedy`, empty where there is nothing to do. Looks at the CUDA driver, its GPUs, the broker
    and how tensors would cross to it; makes a CUDA context on each GPU meanwhile. Raises nothing: what cannot be found
    out, or takes too long, is a finding. `python -m luna_broker doctor` prints the same.
    """
    return _native.diagnose(address).findings


def __getattr__(name: str) -> object:
    # Looked up each time: once torch is loaded the class is a torch.OutOfMemoryError too.
    if name == "OutOfMemory":
        return _native.out_of_memory_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
