"""Teacher's hidden states with zero mean and unit variance by dimension.

Some dimensions of large networks are hundreds of times as large as the others.
Standardised, all count alike in the loss and in codebooks, and a constant
student has a loss of 1.
"""

import torch

# A deviation below this part of the mean is rounding of float32.
CONSTANT = 1e-6


def measure(states, taps):
    """Mean and deviation of each dimension of ``(frames, dim)``, by layer.

    `taps` are the dimensions of the layers by path, in the order of the states.
    The deviation of a dimension that is constant is 0.

    Example
    -------
    >>> measure(torch.tensor([[1.0, 7.0], [3.0, 7.0]]), {"encoder": 2})
    {'encoder': {'mean': [2.0, 7.0], 'deviation': [1.0, 0.0]}}
    """
    deviation, mean = torch.std_mean(states.double(), dim=0, correction=0)
    deviation = deviation.where(deviation > CONSTANT * mean.abs(), 0.0)
    parts = [x.float().split(list(taps.values())) for x in (mean, deviation)]
    return {
        path: {"mean": mean.tolist(), "deviation": deviation.tolist()}
        for path, mean, deviation in zip(taps, *parts, strict=True)
    }


class Standardiser(torch.nn.Module):
    """Standardise hidden states; a dimension that is constant becomes 0.

    The statistics are from :func:`measure`, the taps paths of the layers in the
    order of the hidden states.

    Example
    -------
    >>> states = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
    >>> statistics = measure(states, {"encoder": 2})
    >>> Standardiser(statistics, ["encoder"])(states)
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """

    def __init__(self, statistics, taps):
        super().__init__()
        mean, deviation = (
            torch.tensor(sum((statistics[path][name] for path in taps), []))
            for name in ("mean", "deviation")
        )
        # Kept beside the targets or the stage, and so in no checkpoint.
        self.register_buffer("mean", mean, persistent=False)
        scale = torch.where(deviation > 0, 1 / deviation, 0.0)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, hidden):
        """Standardise ``(..., dim)``."""
        return (hidden - self.mean) * self.scale
