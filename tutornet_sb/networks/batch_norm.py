"""Batch normalisation over the batches of all processes."""

import torch
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from tutornet_sb.util import processes


class CpuSyncBatchNorm(_BatchNorm):
    """``torch.nn.SyncBatchNorm`` for the CPU, where that one does not work.

    In training, statistics and gradients are those of all processes' batches
    together; otherwise it is the layer ``norm``, whose parameters it takes.
    """

    def __init__(self, norm):
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine
        )
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.train(norm.training)

    def forward(self, x):
        """Normalise ``(batch, dim, ...)``."""
        if not self.training or processes.count() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [0, *range(2, x.dim())]
        sums = torch.cat(
            [
                wide.sum(axes, dtype=torch.float64),
                wide.square().sum(axes, dtype=torch.float64),
                torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64),
            ]
        )
        first, second, size = all_reduce(sums).split([*2 * [x.shape[1]], 1])
        mean = first / size
        variance = second / size - mean.square()
        self._track(mean.detach(), variance.detach() * size / (size - 1))
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale, shift = (part.to(wide).view(shape) for part in (scale, shift))
        return (wide * scale + shift).to(x)

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"expected (batch, dim, ...), got {x.dim()} axes")

    @torch.no_grad()
    def _track(self, mean, variance):
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


def synchronise_batch_norms(module):
    """Make batch normalisation use the batches of all processes.

    Layers are replaced in place and keep names, parameters and statistics.
    Returns the module, or its replacement if it is such a layer itself.
    """
    if next(module.parameters()).device.type != "cpu":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, _BatchNorm):
        return CpuSyncBatchNorm(module)
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, _BatchNorm):
                setattr(parent, name, CpuSyncBatchNorm(layer))
    return module
