"""The configuration of a training for int8."""

from typing import Self

from pydantic import Field, model_validator

from asc_ray.errors import ConfigError
from asc_ray.section import Section

INT8_FORM = 2  # part of the artifact's key: raise it when an int8 training writes something else
ONNX_MODEL = "model.onnx"
# Networks that the scheme cannot compute from 8-bit values, with the reason.
FLOAT_ALONE = {"cnn_gru": "a GRU feeds its state back, and its gates have no 8-bit kernel in onnxruntime"}


class QATConfig(Section):
    """Quantization-aware training from the trained student; augmentation and objective stay the student's."""

    epochs: int = Field(20, ge=0, description="0: post-training quantization of the weights as they are")
    calibration_clips: int = Field(512, ge=1, description="training clips that give the ranges with `epochs: 0`")
    frozen_epochs: int = Field(4, ge=0, description="last epochs with observers and batch-norm statistics frozen")
    learning_rate: float = Field(5e-5, gt=0.0, le=1.0, description="replaces the student's; its schedule stays")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0, description="replaces the student's")

    @model_validator(mode="after")
    def _observes_first(self) -> Self:
        if 0 < self.epochs <= self.frozen_epochs:
            raise ValueError(f"frozen_epochs: {self.frozen_epochs} of {self.epochs} epochs leaves none to observe in")
        return self


def check_int8(network: str) -> None:
    """Raise ConfigError for a network that has no int8 form."""
    if reason := FLOAT_ALONE.get(network):
        raise ConfigError(
            f"student.model: {network} has no int8 form, because {reason}. Train it with `asc-ray student` and compare "
            "it with `asc-ray table`, or choose another network"
        )
