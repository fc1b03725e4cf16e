"""What crosses in one request: the three sizes, and the two ways of choosing their latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

SMALL, MIDDLE, LARGE = "1 MB", "12.6 MB", "100 MB"


@dataclass(frozen=True)
class Size:
    """One request: an fp16 latent [1,4,h,w] goes out, a float32 image [1,ratio*h,ratio*w,3] comes back."""

    name: str
    side: int
    ratio: int

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (1, 4, self.side, self.side)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return (1, self.ratio * self.side, self.ratio * self.side, 3)

    @property
    def latent_bytes(self) -> int:
        return 2 * prod(self.latent_shape)

    @property
    def image_bytes(self) -> int:
        return 4 * prod(self.image_shape)

    @property
    def model(self) -> str:
        """The broker's do-nothing model that turns this latent into this image."""
        return "builtin:hand-off" if self.ratio == 8 else f"builtin:hand-off-x{self.ratio}"

    def as_json(self) -> dict:
        return asdict(self)


# The bar speaks of a 131,072-byte latent at every image size, so that only the image's size varies.
FIXED_LATENT = (Size(SMALL, 128, 2), Size(MIDDLE, 128, 8), Size(LARGE, 128, 23))

# For a broker whose do-nothing model knows only the ratio 8: the latent, which is always copied, grows with the image.
GROWING_LATENT = (Size(SMALL, 37, 8), Size(MIDDLE, 128, 8), Size(LARGE, 362, 8))
