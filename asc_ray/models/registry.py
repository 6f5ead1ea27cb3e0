"""The networks by their configuration's `name`."""

from collections.abc import Callable

import torch
from torch import nn

from asc_ray.models.bsconv import BSConvCNN
from asc_ray.models.cnn_gru import CNNGRU
from asc_ray.models.config import AnyModelConfig
from asc_ray.models.cp_mobile import CPMobile
from asc_ray.models.cp_resnet import CPResNet
from asc_ray.models.dcase22_baseline import DCASE22Baseline
from asc_ray.models.ds_flexinet import DSFlexiNet
from asc_ray.models.own import OwnNetwork, own_network
from asc_ray.models.passt import Passt
from asc_ray.models.tf_sepnet import TFSepNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "passt": Passt,
    "cp_resnet": CPResNet,
    "cp_mobile": CPMobile,
    "ds_flexinet": DSFlexiNet,
    "dcase22_baseline": DCASE22Baseline,
    "bsconv_cnn": BSConvCNN,
    "tf_sepnet": TFSepNet,
    "cnn_gru": CNNGRU,
    "module": own_network,
}


def build(config: AnyModelConfig, scenes: int, seed: int = 0) -> nn.Module:
    """Build the network on the CPU: (B, 1, F, T) to logits (B, scenes). The same seed gives the same weights, and the
    process's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return NETWORKS[config.name](config, scenes)


def head_of(config: AnyModelConfig, scenes: int) -> list[str]:
    """Return the names of the tensors whose shape goes by the number of scenes: the head's."""
    with torch.device("meta"):
        shapes = [{n: t.shape for n, t in build(config, count).state_dict().items()} for count in (scenes, scenes + 1)]
    return [name for name, shape in shapes[0].items() if shape != shapes[1][name]]


def folded(model: nn.Module) -> nn.Module:
    """Fold the batch norms into the convolutions before them, for evaluation: the results are equal up to rounding.

    Foreign code is left as it is, because folding follows one call and keeps what that has drawn or chosen.
    """
    from torch.fx.experimental.optimization import fuse  # takes longer to import than torch

    model.eval()
    if isinstance(model, OwnNetwork):
        return model
    return fuse(model) if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) else model
