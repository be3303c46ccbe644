"""Models as people write them by hand. In: nothing. Out: a row per model, small, with seeded weights and arguments for any batch size.

None of them was written with a compiler in mind; they use what torch's tutorials use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from piecework.bench.lists.sample import Call, Row, Sample

SEED = 3
Model = Callable[[], nn.Module]
Arguments = Callable[[int], tuple[object, ...]]


def plain_models() -> list[Row]:
    """A row per model of this module."""
    return [
        _row("small CNN", SmallCNN, _images(1, 28)),
        _row("U-Net", UNet, _images(3, 32)),
        _row("ResNet by hand", ResNet, _images(3, 32)),
        _row("depthwise separable CNN", Separable, _images(3, 32)),
        _row("MLP", MLP, _normal(20)),
        _row("MLP with batch norm", NormedMLP, _normal(20)),
        _row("recommender with bags", BagRecommender, _bags),
        _row("LSTM classifier", lambda: Recurrent(nn.LSTM), _words(11)),
        _row("small GPT", SmallGPT, _words(10)),
        _row("attention with a mask", MaskedAttention, _masked),
        _row("mixture of experts", MixtureOfExperts, _normal(16)),
        _row("temporal convolution", TemporalConvolution, _signals),
        _row("capsule routing", Capsules, _normal(24)),
        _row("physics-informed MLP with Fourier features", FourierMLP, _normal(2)),
    ]


def _row(name: str, make: Model, arguments: Arguments) -> Row:
    return model_row("plain torch", name, make, arguments)


def model_row(source: str, name: str, make: Model, arguments: Arguments) -> Row:
    """The row of a model that is made and called with seeded numbers."""

    def samples(_: int) -> list[Sample]:
        torch.manual_seed(SEED)
        model = make().eval()
        return [Sample("", lambda: copy.deepcopy(model), lambda n: _call(arguments, n))]

    return Row(source, name, samples)


def _call(arguments: Arguments, n: int) -> Call:
    torch.manual_seed(SEED)
    return tuple(arguments(n)), {}


# --- arguments -------------------------------------------------------------------------------------


def _images(channels: int, side: int) -> Arguments:
    return lambda n: (torch.randn(n, channels, side, side),)


def _normal(width: int) -> Arguments:
    return lambda n: (torch.randn(n, width),)


def _words(length: int) -> Arguments:
    return lambda n: (torch.randint(0, 50, (n, length)),)


def _signals(n: int) -> tuple[object, ...]:
    return (torch.randn(n, 4, 50),)


def _bags(n: int) -> tuple[object, ...]:
    """Three items a user, as one list with offsets."""
    return torch.randint(0, 40, (3 * n,)), torch.arange(n) * 3, torch.randn(n, 6)


def _masked(n: int) -> tuple[object, ...]:
    lengths = torch.arange(n) % 5 + 3
    return torch.randn(n, 9, 16), torch.arange(9)[None] >= lengths[:, None]


# --- vision ----------------------------------------------------------------------------------------


class SmallCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.drop = nn.Dropout(0.25)
        self.fc1 = nn.Linear(16 * 12 * 12, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return F.log_softmax(self.fc2(self.drop(F.relu(self.fc1(x)))), dim=1)


def _double_conv(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (before, after):
        layers += [nn.Conv2d(width, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc = _double_conv(3, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), _double_conv(8, 16))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), _double_conv(16, 32))
        self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.conv1 = _double_conv(32, 16)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv2 = _double_conv(24, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.inc(x)
        second = self.down1(first)
        third = self.down2(second)
        up = self.up1(third)
        height = second.size(2) - up.size(2)
        up = F.pad(up, [0, second.size(3) - up.size(3), 0, height])
        up = self.conv1(torch.cat([second, up], dim=1))
        return self.out(self.conv2(torch.cat([first, self.up2(up)], dim=1)))


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module | None = None
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x if self.shortcut is None else self.shortcut(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += kept
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(_Block(8, 8), _Block(8, 16, 2), _Block(16, 32, 2))
        self.average = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.average(self.layers(self.pool(self.stem(x))))
        return self.fc(x.view(x.size(0), -1))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 12, 3, padding=1, groups=3)
        self.pointwise = nn.Conv2d(12, 16, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.squeeze = nn.Linear(16, 4)
        self.excite = nn.Linear(4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.norm(self.pointwise(self.depthwise(x))))
        b, c, _, _ = x.shape
        scale = x.mean((2, 3)).view(b, c)
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(scale)))).view(b, c, 1, 1)
        return (x * scale).amax((-1, -2))


# --- rows of features ------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(20, 32),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(32, 32),
            nn.GELU(),
            nn.Linear(32, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).softmax(-1)


class NormedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 32)
        self.bn = nn.BatchNorm1d(32)
        self.fc2 = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.fc2(F.leaky_relu(self.bn(self.fc1(x))))
        return scores, scores.argmax(dim=1)


class FourierMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, 8))
        self.net = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = 2 * torch.pi * x @ self.frequencies
        return self.net(torch.cat([angle.sin(), angle.cos()], dim=-1)).squeeze(-1)


class Capsules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4, 5) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        votes = torch.einsum("bnd,knde->bkne", x.view(-1, 6, 4), self.weight)
        routing = torch.zeros(votes.shape[:3], device=x.device)
        for _ in range(3):
            out = (routing.softmax(1).unsqueeze(-1) * votes).sum(2)
            norm = out.norm(dim=-1, keepdim=True)
            out = out * norm / (1 + norm**2)
            routing = routing + (votes * out.unsqueeze(2)).sum(-1)
        return out.norm(dim=-1)


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = (chosen == index).float() * weights
            out = out + expert(x) * mask.sum(-1, keepdim=True)
        return out


# --- recommenders ----------------------------------------------------------------------------------


class BagRecommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(40, 8, mode="mean")
        self.dense = nn.Linear(6, 8)
        self.top = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(
        self, items: torch.Tensor, offsets: torch.Tensor, dense: torch.Tensor
    ) -> torch.Tensor:
        both = torch.cat([self.items(items, offsets), self.dense(dense)], dim=1)
        return torch.sigmoid(self.top(both)).flatten()


# --- sequences -------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.layer = layer(12, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(32, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        output, _ = self.layer(self.embed(words))
        return self.out(output.mean(dim=1))


class SmallGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(50, 16), nn.Embedding(32, 16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        b, t = ids.size()
        x = self.embed(ids) + self.positions(torch.arange(t, device=ids.device))
        q, k, v = self.qkv(self.norm1(x)).split(16, dim=2)
        q, k, v = (each.view(b, t, 4, 4).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(b, t, 16))
        x = x + self.mlp(self.norm2(x))
        return x @ self.embed.weight.t()


class MaskedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, weights = self.attention(x, x, x, key_padding_mask=padding)
        return out.masked_fill(padding.unsqueeze(-1), 0.0), weights


class TemporalConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(4, 4, 3, dilation=2**i) for i in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, conv in enumerate(self.convs):
            x = x + F.relu(conv(F.pad(x, (2 ** (index + 1), 0))))
        return x[..., -1]
