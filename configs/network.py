"""What every ``model`` section is, whatever its arch."""

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import model_validator

from configs.base import Section

MOST_BLOCKS, WIDEST = 1000, 65536                # of a network in any of its numbers; published ones have 6 and 1,536


class Network(Section, ABC):
    """What the rest of the program asks of a ``model`` section, whatever its arch."""

    NOT_THE_NETWORK: ClassVar[set[str]] = {"dropout"}
    """Keys that may change between training and use: the weights fit either way."""

    arch: str

    @model_validator(mode="after")
    def _is_no_larger_than_any(self):
        """A stranger's file must not make a network that fills the memory layer by layer."""
        for key, value in self:
            limit = MOST_BLOCKS if "block" in key else WIDEST
            if isinstance(value, tuple) and len(value) > MOST_BLOCKS:
                raise ValueError(f"model.{key} has {len(value)} entries, at most {MOST_BLOCKS} are possible")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and number > limit:
                    raise ValueError(f"model.{key} {number} is beyond {limit}")
        return self

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """Size of the label set; 0: not conditioned on labels."""

    @property
    def conditional(self) -> bool:
        """Whether it may be conditioned on anything, so that conditions can be dropped."""
        return self.num_labels > 0

    @property
    def prompted(self) -> bool:
        """Whether it is told prompts."""
        return False

    @property
    def latent(self) -> bool:
        """Whether it diffuses an autoencoder's latents instead of pixels."""
        return False

    @property
    def learns_variance(self) -> bool:
        """Whether the output has a second half that says how large the variance of a step is."""
        return False

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels at the highest resolution, by which the memory format is chosen."""

    @abstractmethod
    def check(self, data) -> None:
        """ValueError where the network cannot work on images of the ``data`` section."""

    def essence(self) -> dict:
        """The keys that decide which weights fit and what they compute."""
        return {key: value for key, value in self if key not in self.NOT_THE_NETWORK}


def check_halvings(data, levels: int, key: str) -> None:
    """ValueError unless both sides of the images can be halved ``levels`` - 1 times."""
    factor = 2 ** (levels - 1)
    for side in (data.height, data.width):
        if side % factor:
            below = side // factor * factor
            nearest = f"{below} and {below + factor}" if below else f"{factor}"
            raise ValueError(f"data.image_size {side} cannot be halved {levels - 1} times for {key}; nearest valid: "
                             f"{nearest}")


def check_channels(data, **given: int) -> None:
    """ValueError unless these keys are data.channels."""
    for key, channels in given.items():
        if channels != data.channels:
            raise ValueError(f"model.{key} {channels} must equal data.channels {data.channels}")
