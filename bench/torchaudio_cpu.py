"""Import of torchaudio, the reference for our front end, which also works with a torch without CUDA."""

import sys
from types import ModuleType

import torch


def import_torchaudio() -> ModuleType:
    """Import torchaudio and return it. Raises ImportError if it is not installed or cannot be imported.

    torchaudio's wheel has an extension that is linked to CUDA, so its import fails with a CPU build of torch. An empty
    module then replaces the extension, because nothing that we compare with is in it.
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
