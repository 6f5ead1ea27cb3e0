"""torchaudio, the reference of our front end, beside a torch without CUDA too."""

import sys
from types import ModuleType

import torch


def import_torchaudio() -> ModuleType:
    """Imports torchaudio and returns it; raises ImportError where it is not installed or does not import.

    torchaudio's wheel has an extension that is linked to CUDA, so its import fails beside a CPU build of torch. Nothing
    that we compare with is in that extension: there, an empty module takes its place.
    """
    try:
        import torchaudio
    except OSError as error:
        if torch.version.cuda is not None:
            raise ImportError(f"torchaudio does not import: {error}") from error
        empty = ModuleType("torchaudio._extension")
        empty.__dict__.update(_IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, __path__=[])
        empty.__dict__["fail_if_no_align"] = lambda function: function
        sys.modules[empty.__name__] = empty
        import torchaudio
    return torchaudio
