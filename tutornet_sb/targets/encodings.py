"""Teacher's targets as bytes, a fixed number for each frame.

What frame weights depend on is kept precisely, whatever the rest is rounded to:
the probability of the blank, and the root mean square of the hidden states.

``encode`` turns ``(..., size)`` into ``(..., frame_bytes)``; ``decode``, or for
shares of a probability mass ``(..., 1)`` ``share_out``, turn it back.
"""

import math

import torch

from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.util.errors import InputError

CENTROIDS = 256
# Frames whose distances to centroids are held at a time: few enough for a cache
CHUNK = 512
# Beam of residual quantisation: partial sums of centroids that are kept
BEAM = 8


def _divide(x, y):
    return x / y.clamp(min=torch.finfo(y.dtype).tiny)


def _to_bytes(x):
    return x.contiguous().view(torch.uint8)


def _from_bytes(raw, dtype):
    # A slice of one frame is contiguous, but may not be aligned.
    raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(dtype)


def _to_half(x, what):
    half = x.to(torch.float16)
    if not half.isfinite().all():
        raise InputError(
            f"{what} reach {x.abs().max().item():.3g}, which is more than "
            "fp16 holds: choose another encoding"
        )
    return half


def _to_root(share):
    """Probabilities on a scale that is fine where they are small."""
    return (255 * share.clamp(0, 1).sqrt()).round().to(torch.uint8)


def _from_root(codes):
    """Probabilities but for a factor: their shares in the sum are meant."""
    return codes.to(torch.float32).square()


def _share_out(mass, parts):
    """Give each part its share of a mass."""
    return parts * _divide(mass, parts.sum(-1, keepdim=True))


class _Halves:
    """Shares or hidden states in fp16."""

    def __init__(self, size, top_k=None):
        self.frame_bytes = 2 * size

    def encode(self, values):
        return _to_bytes(_to_half(values, "hidden states"))

    def decode(self, raw):
        return _from_bytes(raw, torch.float16).to(torch.float32)

    def share_out(self, raw, mass):
        return _share_out(mass, self.decode(raw))


class _ByteShares:
    """The root of each symbol's share in a byte, off by at most 1/510."""

    def __init__(self, symbols, top_k=None):
        self.frame_bytes = symbols

    def encode(self, shares):
        return _to_root(shares)

    def share_out(self, raw, mass):
        return _share_out(mass, _from_root(raw))


class _TopShares:
    """The k greatest shares, their roots in a byte each.

    The rest is split evenly among the other symbols, so that the shares still
    sum to 1.
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
        index = _to_bytes(index.to(self.index))
        return torch.cat([index, _to_root(kept)], dim=-1)

    def share_out(self, raw, mass):
        index = _from_bytes(raw[..., : self.index_bytes], self.index).long()
        # A damaged index must not leave the row.
        index = index.clamp(0, self.symbols - 1)
        kept = _from_root(raw[..., self.index_bytes :])
        others = self.symbols - self.k
        if not others:
            whole = kept.new_zeros(kept.shape)
            return whole.scatter_(-1, index, _share_out(mass, kept))
        total = kept.sum(-1, keepdim=True)
        # Roots that were rounded up may be more than all.
        whole = total.clamp(min=255**2)
        unit = mass / whole
        left = (whole - total) * (unit / others)
        shares = left.expand(*left.shape[:-1], self.symbols).clone()
        return shares.scatter_(-1, index, kept * unit)


class _ByteStates:
    """Hidden states in a byte each, times a scale of the frame in float32.

    Off by at most about 1/254 of the frame's greatest. The scale restores the
    frame's root mean square.
    """

    def __init__(self, size):
        self.frame_bytes = 4 + size

    def encode(self, states):
        step = states.abs().amax(-1, keepdim=True) / 127
        codes = _divide(states, step).round().clamp(-127, 127)
        scale = _divide(_rms(states), _rms(codes))
        codes = codes.to(torch.int8)
        return torch.cat([_to_bytes(scale), _to_bytes(codes)], dim=-1)

    def decode(self, raw):
        scale = _from_bytes(raw[..., :4], torch.float32)
        return _from_bytes(raw[..., 4:], torch.int8) * scale


class _QuantisedStates(torch.nn.Module):
    """Hidden states by centroids of codebooks, a byte for each codebook.

    A frame is divided by its root mean square, which is kept in fp16 and
    restored. Codebooks are ``(code bytes, 256, dim)``. A subclass has ``find``,
    from frames ``(frames, size)`` to codes ``(frames, code bytes)``, and
    ``look_up`` from rows of all codebooks, one under another, to frames.
    """

    def __init__(self, size, codebooks):
        super().__init__()
        self.size = size
        self.frame_bytes = 2 + len(codebooks)
        # In the store, and so in no checkpoint.
        self.register_buffer("codebooks", codebooks, persistent=False)
        first = CENTROIDS * torch.arange(len(codebooks))
        self.register_buffer("first", first, persistent=False)

    def encode(self, states):
        rms = _rms(states)
        unit = _divide(states, rms).flatten(0, -2)
        codes = torch.cat([self.find(part) for part in unit.split(CHUNK)])
        codes = codes.to(torch.uint8).unflatten(0, states.shape[:-1])
        half = _to_bytes(_to_half(rms, "root mean squares of hidden states"))
        return torch.cat([half, codes], dim=-1)

    def decode(self, raw):
        rms = _from_bytes(raw[..., :2], torch.float16).to(torch.float32)
        index = raw[..., 2:].flatten(0, -2).long() + self.first
        unit = self.look_up(index).unflatten(0, raw.shape[:-1])
        return unit * _divide(rms, _rms(unit))


class _ProductStates(_QuantisedStates):
    """Product quantisation: each codebook is of a part of the dimensions."""

    def find(self, unit):
        parts = len(self.codebooks)
        unit = _pad(unit, parts).unflatten(-1, (parts, -1)).transpose(0, 1)
        squares = self.codebooks.square().sum(-1).unsqueeze(1)
        distances = torch.baddbmm(
            squares, unit, self.codebooks.transpose(1, 2), alpha=-2
        )
        return distances.argmin(-1).transpose(0, 1)

    def look_up(self, index):
        table = self.codebooks.flatten(0, 1)
        unit = torch.nn.functional.embedding(index, table).flatten(-2)
        return unit[..., : self.size]


class _ResidualStates(_QuantisedStates):
    """Residual quantisation: the sum of centroids, one of each codebook.

    Each codebook is of the residuals of those before it. At the same size it is
    nearer than product quantisation, and slower to encode.
    """

    _products = None

    def find(self, unit):
        """Codes of the nearest sums, by beam search.

        The squared distance to a sum of centroids is, up to a constant,
        ``sum |c|^2 - 2 x c + 2 sum c c'``: all products are computed once.
        """
        table = self.codebooks.flatten(0, 1)
        products, squares = self._inner_products(table)
        dots = (unit @ table.T).unflatten(1, (-1, CENTROIDS))
        frames = len(unit)
        rows = unit.new_empty(frames, 1, 0, dtype=torch.long)
        scores = unit.new_zeros(frames, 1)
        for step in range(len(self.codebooks)):
            more = (squares[step] - 2 * dots[:, step]).unsqueeze(1)
            scores = scores.unsqueeze(-1) + more
            if step:
                earlier = torch.nn.functional.embedding_bag(
                    rows.flatten(0, 1), products[step], mode="sum"
                )
                scores += earlier.view(scores.shape)
            beam = min(BEAM, scores[0].numel())
            scores, best = scores.flatten(1).topk(beam, largest=False)
            before = (best // CENTROIDS).unsqueeze(-1).expand(-1, -1, step)
            row = step * CENTROIDS + best % CENTROIDS
            rows = torch.cat([rows.gather(1, before), row.unsqueeze(-1)], -1)
        return rows[:, 0] - self.first

    def _inner_products(self, table):
        """Twice those of all centroids, and their squares; made once."""
        if self._products is None or self._products.device != table.device:
            products = 2 * table @ table.T
            # (codebooks, rows of all codebooks, 256)
            self._products = (
                products.unflatten(1, (-1, CENTROIDS))
                .transpose(0, 1)
                .contiguous()
            )
        return self._products, table.square().sum(-1).view(-1, 1, CENTROIDS)

    def look_up(self, index):
        table = self.codebooks.flatten(0, 1)
        return torch.nn.functional.embedding_bag(index, table, mode="sum")


POSTERIORS = {"fp16": _Halves, "uint8": _ByteShares, "topk": _TopShares}
QUANTISERS = {"pq": _ProductStates, "rq": _ResidualStates}
HIDDEN = {"fp16": _Halves, "int8": _ByteStates, **QUANTISERS}


def _rms(states):
    return states.square().mean(-1, keepdim=True).sqrt()


def _pad(states, parts):
    """Zeros at the end, so that all parts are alike."""
    size = states.shape[-1]
    return torch.nn.functional.pad(states, (0, -size % parts))


def codebook_shape(kind, size, code_bytes):
    """Codebooks, centroids and dimension of a centroid, for a layer's size.

    Example
    -------
    >>> codebook_shape("pq", 250, 8), codebook_shape("rq", 250, 8)
    ((8, 256, 32), (8, 256, 250))
    """
    dim = math.ceil(size / code_bytes) if kind == "pq" else size
    return code_bytes, CENTROIDS, dim


def train_codebooks(kind, states, code_bytes, seed=0):
    """Codebooks of a quantiser by k-means, see :func:`codebook_shape`.

    `states` are the hidden states of a sample of frames, ``(frames, size)``.

    Example
    -------
    >>> train_codebooks("pq", torch.randn(500, 6), code_bytes=2).shape
    torch.Size([2, 256, 3])
    """
    import faiss

    size = states.shape[-1]
    if not 0 < code_bytes <= size:
        raise InputError(
            f"code_bytes of {size} dimensions must be 1 to {size}, got "
            f"{code_bytes}"
        )
    unit = _divide(states, _rms(states))
    if kind == "pq":
        unit = _pad(unit, code_bytes)
        quantiser = faiss.ProductQuantizer(unit.shape[1], code_bytes, 8)
    else:
        quantiser = faiss.ResidualQuantizer(size, code_bytes, 8)
        # On a small teacher as near as its default, in a tenth of the time
        quantiser.train_type = faiss.ResidualQuantizer.Train_default
        quantiser.max_beam_size = 1
        quantiser.cp.niter = 10
    # k-means wants a point for each centroid.
    unit = unit.repeat(-(-CENTROIDS // len(unit)), 1)
    quantiser.cp.seed = seed
    # No warning about small samples
    quantiser.cp.min_points_per_centroid = 1
    quantiser.train(unit.float().cpu().contiguous().numpy())
    found = quantiser.centroids if kind == "pq" else quantiser.codebooks
    shape = codebook_shape(kind, size, code_bytes)
    return torch.from_numpy(faiss.vector_to_array(found)).view(shape)


class TargetCodec(torch.nn.Module):
    """Targets of a teacher to bytes and back.

    Each frame has two strings of bytes, one of its posteriors and one of its
    hidden states, since softmax-level distillation needs only the first. The
    posteriors begin with ``p(blank)`` or, where that is smaller,
    ``1 - p(blank)`` in fp16; each other symbol has its share of the latter. So
    the blank is never rounded away, and posteriors sum to 1 whatever the
    encoding.

    `taps` are the dimensions of the tapped layers by path, in the order of the
    hidden states; encodings are named in ``POSTERIORS`` and ``HIDDEN``. `top_k`
    symbols are kept besides the blank; `code_bytes` are those of a
    quantised layer besides two of its root mean square, and `codebooks` its
    centroids by path.
    """

    def __init__(
        self,
        symbols,
        taps,
        frame_period,
        posteriors="topk",
        top_k=4,
        hidden="rq",
        code_bytes=8,
        codebooks=None,
    ):
        super().__init__()
        if symbols and posteriors not in POSTERIORS:
            raise InputError(
                f"no encoding of posteriors {posteriors!r}; choose from: "
                + ", ".join(POSTERIORS)
            )
        if taps and hidden not in HIDDEN:
            raise InputError(
                f"no encoding of hidden states {hidden!r}; choose from: "
                + ", ".join(HIDDEN)
            )
        if symbols == 1:
            raise InputError("1 symbol leaves none besides the blank")
        if symbols and posteriors == "topk" and top_k < 1:
            raise InputError(f"top_k must be at least 1, got {top_k}")
        self.symbols = symbols
        self.taps = dict(taps)
        self.frame_period = frame_period
        self.shares = None
        if symbols:
            self.shares = POSTERIORS[posteriors](symbols - 1, top_k)
        if taps and hidden in QUANTISERS:
            self._check_codebooks(hidden, code_bytes, codebooks or {})
            states = [
                QUANTISERS[hidden](size, codebooks[path])
                for path, size in self.taps.items()
            ]
        else:
            states = [HIDDEN[hidden](size) for size in self.taps.values()]
        self.states = dict(zip(self.taps, states, strict=True))
        # So that codebooks follow the module to its device.
        self.quantised = torch.nn.ModuleList(
            s for s in states if isinstance(s, torch.nn.Module)
        )
        self.posterior_bytes = 2 + self.shares.frame_bytes if self.shares else 0
        self.hidden_bytes = sum(s.frame_bytes for s in states)

    def _check_codebooks(self, hidden, code_bytes, codebooks):
        for path, size in self.taps.items():
            if not 0 < code_bytes <= size:
                raise InputError(
                    f"code_bytes: layer {path} of {size} dimensions needs 1 to "
                    f"{size} bytes a frame, got {code_bytes}"
                )
            wanted = codebook_shape(hidden, size, code_bytes)
            found = tuple(getattr(codebooks.get(path), "shape", ()))
            if found != wanted:
                raise InputError(
                    f"the codebooks of layer {path} must be {wanted}, got "
                    f"{found}"
                )

    def encode(self, targets):
        """Encode finite targets of utterances.

        Returns posteriors ``(batch, frames, posterior_bytes)`` and hidden
        states ``(batch, frames, hidden_bytes)``, uint8.
        """
        hidden, posteriors = targets.hidden.float(), targets.posteriors.float()
        if not (hidden.isfinite().all() and posteriors.isfinite().all()):
            raise InputError("targets are not finite")
        encoded = [hidden.new_empty(*hidden.shape[:2], 0, dtype=torch.uint8)]
        sizes = list(self.taps.values())
        for states, part in zip(
            self.states.values(), hidden.split(sizes, dim=-1), strict=True
        ):
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
