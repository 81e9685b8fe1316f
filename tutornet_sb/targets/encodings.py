"""Teacher's targets as bytes, a fixed number for each frame.

What frame weights depend on is kept precisely, whatever the rest is rounded to:
the probability of the blank, and the root mean square of the hidden states.

``encode`` turns ``(..., size)`` into ``(..., frame_bytes)``; ``decode``, or for
shares of a probability mass ``(..., 1)`` ``share_out``, turn it back.
"""

import torch

from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.util.errors import InputError

# Names of the encodings, see ``TargetCodec``
POSTERIORS = "fp16", "topk"
HIDDEN = "fp16", "rq"

CENTROIDS = 256
# Frames whose distances to centroids are held at a time: few enough for a cache
CHUNK = 512
# Beam of residual quantisation: partial sums of centroids that are kept
BEAM = 8


def _divide(x, y):
    return x / y.clamp(min=torch.finfo(y.dtype).tiny)


def _rms(states):
    return states.square().mean(-1, keepdim=True).sqrt()


def _to_bytes(x):
    return x.contiguous().view(torch.uint8)


def _from_bytes(raw, dtype):
    # A slice of one frame is contiguous, but may not be aligned.
    raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(dtype)


class _Halves(torch.nn.Module):
    """Numbers in fp16: hidden states, their size, or shares of symbols."""

    def __init__(self, size):
        super().__init__()
        self.frame_bytes = 2 * size

    def encode(self, values):
        half = values.to(torch.float16)
        if not half.isfinite().all():
            raise InputError(
                f"hidden states reach {values.abs().max().item():.3g}, which "
                "is more than fp16 holds"
            )
        return _to_bytes(half)

    def decode(self, raw):
        return _from_bytes(raw, torch.float16).to(torch.float32)

    def share_out(self, raw, mass):
        parts = self.decode(raw)
        return parts * _divide(mass, parts.sum(-1, keepdim=True))


class _TopShares:
    """The k greatest shares, their roots in a byte each.

    Roots are fine where probabilities are small. The rest is split evenly among
    the other symbols, so that the shares still sum to 1.
    """

    def __init__(self, symbols, top_k):
        self.symbols = symbols
        self.k = min(top_k, symbols)
        self.index = torch.uint8 if symbols <= 256 else torch.int32
        if 256 < symbols <= 2**15:
            self.index = torch.int16
        self.index_bytes = self.k * self.index.itemsize
        self.frame_bytes = self.index_bytes + self.k

    def encode(self, shares):
        kept, index = shares.topk(self.k, dim=-1)
        roots = (255 * kept.clamp(0, 1).sqrt()).round().to(torch.uint8)
        return torch.cat([_to_bytes(index.to(self.index)), roots], dim=-1)

    def share_out(self, raw, mass):
        index = _from_bytes(raw[..., : self.index_bytes], self.index).long()
        # A damaged index must not leave the row.
        index = index.clamp(0, self.symbols - 1)
        kept = raw[..., self.index_bytes :].to(torch.float32).square()
        total = whole = kept.sum(-1, keepdim=True)
        others = self.symbols - self.k
        if others:
            # Roots that were rounded up may be more than all.
            whole = total.clamp(min=255**2)
        unit = _divide(mass, whole)
        left = (whole - total) * (unit / max(others, 1))
        shares = left.expand(*left.shape[:-1], self.symbols).clone()
        return shares.scatter_(-1, index, kept * unit)


class _ResidualStates(torch.nn.Module):
    """Residual quantisation: sums of centroids, a byte for each codebook.

    A frame is divided by its root mean square, which is kept in fp16 and
    restored. Each codebook is of the residuals of those before it; all are
    ``(code bytes, 256, size)``.
    """

    _products = None

    def __init__(self, codebooks):
        super().__init__()
        self.rms = _Halves(1)
        self.frame_bytes = 2 + len(codebooks)
        # In the store, and so in no checkpoint.
        self.register_buffer("codebooks", codebooks, persistent=False)
        first = CENTROIDS * torch.arange(len(codebooks))
        self.register_buffer("first", first, persistent=False)

    def encode(self, states):
        rms = _rms(states)
        unit = _divide(states, rms).flatten(0, -2)
        codes = torch.cat([self._find(part) for part in unit.split(CHUNK)])
        codes = codes.to(torch.uint8).unflatten(0, states.shape[:-1])
        return torch.cat([self.rms.encode(rms), codes], dim=-1)

    def decode(self, raw):
        rms = self.rms.decode(raw[..., :2])
        index = raw[..., 2:].flatten(0, -2).long() + self.first
        table = self.codebooks.flatten(0, 1)
        unit = torch.nn.functional.embedding_bag(index, table, mode="sum")
        unit = unit.unflatten(0, raw.shape[:-1])
        return unit * _divide(rms, _rms(unit))

    def _find(self, unit):
        """Codes of the nearest sums, by beam search, ``(frames, codebooks)``.

        The squared distance to a sum of centroids is, up to a constant,
        ``sum |c|^2 - 2 x c + 2 sum c c'``: all products are computed once.
        """
        table = self.codebooks.flatten(0, 1)
        squares = table.square().sum(-1).view(-1, 1, CENTROIDS)
        if self._products is None or self._products.device != table.device:
            products = (2 * table @ table.T).unflatten(1, (-1, CENTROIDS))
            # (codebooks, rows of all codebooks, 256)
            self._products = products.transpose(0, 1).contiguous()
        dots = (unit @ table.T).unflatten(1, (-1, CENTROIDS))
        frames = len(unit)
        rows = unit.new_empty(frames, 1, 0, dtype=torch.long)
        scores = unit.new_zeros(frames, 1)
        for step in range(len(self.codebooks)):
            more = (squares[step] - 2 * dots[:, step]).unsqueeze(1)
            scores = scores.unsqueeze(-1) + more
            if step:
                earlier = torch.nn.functional.embedding_bag(
                    rows.flatten(0, 1), self._products[step], mode="sum"
                )
                scores += earlier.view(scores.shape)
            beam = min(BEAM, scores[0].numel())
            scores, best = scores.flatten(1).topk(beam, largest=False)
            before = (best // CENTROIDS).unsqueeze(-1).expand(-1, -1, step)
            row = step * CENTROIDS + best % CENTROIDS
            rows = torch.cat([rows.gather(1, before), row.unsqueeze(-1)], -1)
        return rows[:, 0] - self.first


def train_codebooks(states, code_bytes):
    """Train codebooks of residual quantisation, ``(code_bytes, 256, size)``.

    `states` are the hidden states of a sample of frames, ``(frames, size)``.

    Example
    -------
    >>> train_codebooks(torch.randn(500, 6), code_bytes=2).shape
    torch.Size([2, 256, 6])
    """
    import faiss

    size = states.shape[-1]
    quantiser = faiss.ResidualQuantizer(size, code_bytes, 8)
    # On a small teacher as near as its default, in a tenth of the time
    quantiser.train_type = faiss.ResidualQuantizer.Train_default
    quantiser.max_beam_size = 1
    quantiser.cp.niter = 10
    quantiser.cp.seed = 0
    # No warning about small samples
    quantiser.cp.min_points_per_centroid = 1
    unit = _divide(states, _rms(states))
    # k-means wants a point for each centroid.
    unit = unit.repeat(-(-CENTROIDS // len(unit)), 1)
    quantiser.train(unit.float().cpu().contiguous().numpy())
    found = torch.from_numpy(faiss.vector_to_array(quantiser.codebooks))
    return found.view(code_bytes, CENTROIDS, size)


class TargetCodec(torch.nn.Module):
    """Targets of a teacher to bytes and back.

    Each frame has two strings of bytes, one of its posteriors and one of its
    hidden states, since softmax-level distillation needs only the first. The
    posteriors begin with ``p(blank)`` or, where that is smaller,
    ``1 - p(blank)`` in fp16; each other symbol has its share of the latter. So
    the blank is never rounded away, and posteriors sum to 1 whatever the
    encoding.

    `taps` are the dimensions of the tapped layers by path, in the order of the
    hidden states. Of the posteriors the `top_k` greatest are kept besides the
    blank, or all in fp16; hidden states are quantised (``rq``) by `codebooks`,
    centroids by path, or in fp16.
    """

    def __init__(self, symbols, taps, frame_period, top_k=None, codebooks=None):
        super().__init__()
        self.symbols = symbols
        self.taps = dict(taps)
        self.frame_period = frame_period
        self.shares, self.posterior_bytes = None, 0
        if symbols:
            others = symbols - 1
            self.shares = (
                _TopShares(others, top_k) if top_k else _Halves(others)
            )
            self.posterior_bytes = 2 + self.shares.frame_bytes
        self.states = {
            path: _ResidualStates(codebooks[path])
            if codebooks
            else _Halves(size)
            for path, size in self.taps.items()
        }
        # So that codebooks follow the module to its device.
        self.layers = torch.nn.ModuleList(self.states.values())
        self.hidden_bytes = sum(s.frame_bytes for s in self.layers)

    def encode(self, targets):
        """Encode finite targets of utterances.

        Returns posteriors ``(batch, frames, posterior_bytes)`` and hidden
        states ``(batch, frames, hidden_bytes)``, uint8.
        """
        hidden, posteriors = targets.hidden.float(), targets.posteriors.float()
        encoded = [hidden.new_empty(*hidden.shape[:2], 0, dtype=torch.uint8)]
        parts = hidden.split(list(self.taps.values()), dim=-1)
        for states, part in zip(self.layers, parts, strict=True):
            encoded.append(states.encode(part))
        hidden = torch.cat(encoded, dim=-1)
        if not self.shares:
            return hidden[..., :0], hidden
        # The blank is the first symbol.
        likely, others = posteriors[..., :1], posteriors[..., 1:]
        # Not 1 - p(blank), which loses what is next to nothing.
        nonblank = others.sum(-1, keepdim=True)
        shares = _divide(others, nonblank)
        # The smaller of the two, since fp16 is fine near 0 only; the sign says
        # which.
        half = torch.where(nonblank <= 0.5, nonblank, -likely)
        half = _to_bytes(half.to(torch.float16))
        return torch.cat([half, self.shares.encode(shares)], dim=-1), hidden

    def decode(self, raw, lengths, taps=()):
        """Decode bytes into ``TeacherTargets`` in float32.

        The bytes are posteriors and, if layers are wanted, hidden states, one
        after another, ``(batch, frames, bytes)``; lengths are ``(batch,)``.
        """
        at, parts = self.posterior_bytes, {}
        for path, states in self.states.items():
            if path in taps:
                end = at + states.frame_bytes
                parts[path] = states.decode(raw[..., at:end])
            at += states.frame_bytes
        nothing = raw.new_empty(*raw.shape[:2], 0, dtype=torch.float32)
        hidden = [parts[path] for path in taps]
        if len(hidden) != 1:
            hidden = [torch.cat([nothing, *hidden], dim=-1)]
        posteriors = nothing
        if self.shares:
            half = _from_bytes(raw[..., :2], torch.float16).float()
            nonblank = torch.where(half.signbit(), 1 + half, half)
            likely = torch.where(half.signbit(), -half, 1 - half)
            others = self.shares.share_out(
                raw[..., 2 : self.posterior_bytes], nonblank
            )
            posteriors = torch.cat([likely, others], dim=-1)
        return TeacherTargets(hidden[0], posteriors, lengths, self.frame_period)
