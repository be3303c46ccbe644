"""The models of PyTorch's own tutorials that need no download, written as those tutorials write them.

A row a model, small, with seeded weights. Where a model is refused, the table says what to write in its place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from piecework.bench.lists.sample import Row, Sample
from piecework.integrations.protocol import Call

SEED = 3


def tutorials() -> list[Row]:
    """A row per model of this module."""
    return [
        Row("tutorials", name, partial(_sample, make, arguments))
        for name, make, arguments in (
            ("language model, causal mask", LanguageModel, _sequences),
            ("language model, is_causal", lambda: LanguageModel(hint=True), _sequences),
            ("seq2seq translation", Translation, lambda n: (_tokens(n, 8), _tokens(n, 6))),
            ("character RNN", CharacterRNN, lambda n: (torch.randn(n, 57), torch.zeros(n, 32))),
            ("packed LSTM", PackedLSTM, lambda n: (_tokens(n, 7), _lengths(n))),
            ("masked LSTM", MaskedLSTM, lambda n: (_tokens(n, 7), _lengths(n))),
            ("DCGAN generator", dcgan_generator, lambda n: (torch.randn(n, 16, 1, 1),)),
            ("DCGAN discriminator", dcgan_discriminator, lambda n: (torch.randn(n, 3, 32, 32),)),
            ("variational autoencoder", VAE, lambda n: (torch.rand(n, 1, 28, 28),)),
            ("spatial transformer", SpatialTransformer, lambda n: (torch.randn(n, 1, 28, 28),)),
            ("super-resolution", SuperResolution, lambda n: (torch.randn(n, 1, 14, 14),)),
            ("DLRM", DLRM, lambda n: (torch.randn(n, 13), torch.randint(0, 20, (n, 4)))),
            ("graph convolution", GCN, lambda n: (torch.randn(n, 6, 8), _adjacency(n))),
            ("vision transformer", ViT, lambda n: (torch.randn(n, 3, 32, 32),)),
        )
    ]


def _sample(
    make: Callable[[], nn.Module], arguments: Callable[[int], tuple[object, ...]]
) -> Sample:
    """A model that is made and called with seeded numbers."""

    def call(n: int) -> Call:
        torch.manual_seed(SEED)
        return arguments(n), {}

    torch.manual_seed(SEED)
    model = make().eval()
    return Sample(lambda: copy.deepcopy(model), call)


def _tokens(n: int, length: int) -> torch.Tensor:
    return torch.randint(0, 40, (n, length))


def _sequences(n: int) -> tuple[object, ...]:
    return (_tokens(n, 9),)


def _lengths(n: int) -> torch.Tensor:
    return torch.arange(n) % 5 + 3


def _adjacency(n: int) -> torch.Tensor:
    graph = (torch.rand(n, 6, 6) > 0.5).float()
    return (graph + graph.mT + torch.eye(6)).clamp(max=1)


class PositionalEncoding(nn.Module):
    def __init__(self, width: int, longest: int = 64) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        position = torch.arange(longest).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(longest, width)
        table[:, 0::2] = torch.sin(position * rate)
        table[:, 1::2] = torch.cos(position * rate)
        self.register_buffer("table", table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x + self.table[: x.size(1)])


class LanguageModel(nn.Module):
    """``nn.TransformerEncoder`` under a causal mask."""

    def __init__(self, hint: bool = False) -> None:
        super().__init__()
        self.hint = hint
        self.embedding = nn.Embedding(40, 16)
        self.positions = PositionalEncoding(16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 40)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.positions(self.embedding(tokens) * math.sqrt(16))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.size(1))
        x = self.encoder(x, mask, is_causal=True) if self.hint else self.encoder(x, mask)
        return F.log_softmax(self.head(x), dim=-1)


class Translation(nn.Module):
    """A GRU that reads, and one that writes with additive attention over what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(40, 16), nn.Embedding(40, 16)
        self.encoder = nn.GRU(16, 16, batch_first=True)
        self.decoder = nn.GRU(32, 16, batch_first=True)
        self.query, self.key, self.energy = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.out = nn.Linear(16, 40)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        read, hidden = self.encoder(self.source(source))
        steps = []
        for index in range(target.size(1)):
            query = hidden.permute(1, 0, 2)
            scores = self.energy(torch.tanh(self.query(query) + self.key(read))).squeeze(2)
            context = torch.bmm(F.softmax(scores, dim=-1).unsqueeze(1), read)
            word = self.target(target[:, index : index + 1])
            output, hidden = self.decoder(torch.cat((word, context), dim=2), hidden)
            steps.append(self.out(output))
        return F.log_softmax(torch.cat(steps, dim=1), dim=-1)


class CharacterRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i2h, self.h2h, self.h2o = nn.Linear(57, 32), nn.Linear(32, 32), nn.Linear(32, 18)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.tanh(self.i2h(x) + self.h2h(hidden))
        return F.log_softmax(self.h2o(hidden), dim=1), hidden


class PackedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.out = nn.Linear(16, 2)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        return self.out(self.lstm(packed)[1][0][-1])


class MaskedLSTM(PackedLSTM):
    """The same without packing: the state after each row's last word is picked from all states."""

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, states.size(2))
        return self.out(states.gather(1, last).squeeze(1))


def dcgan_generator() -> nn.Module:
    return nn.Sequential(
        *(nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=False), nn.BatchNorm2d(32), nn.ReLU(True)),
        *(nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True)),
        *(nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh()),
    )


def dcgan_discriminator() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)),
        *(nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32)),
        *(nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(32, 1, 8, 1, 0, bias=False), nn.Sigmoid()),
    )


class VAE(nn.Module):
    """In ``eval`` the mean is decoded; drawing from it is for training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(784, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.fc3, self.fc4 = nn.Linear(8, 32), nn.Linear(32, 784)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = F.relu(self.fc1(x.view(-1, 784)))
        mean, spread = self.fc21(hidden), self.fc22(hidden)
        code = mean
        if self.training:
            code = mean + torch.randn_like(spread) * torch.exp(0.5 * spread)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(code)))), mean, spread


class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(
            *(nn.Conv2d(1, 8, kernel_size=7), nn.MaxPool2d(2, stride=2), nn.ReLU(True)),
            *(nn.Conv2d(8, 10, kernel_size=5), nn.MaxPool2d(2, stride=2), nn.ReLU(True)),
        )
        self.theta = nn.Sequential(nn.Linear(90, 16), nn.ReLU(True), nn.Linear(16, 6))
        self.conv = nn.Conv2d(1, 10, kernel_size=5)
        self.out = nn.Linear(1440, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta = self.theta(self.localization(x).view(-1, 90)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=False))
        x = F.relu(F.max_pool2d(self.conv(x), 2))
        return F.log_softmax(self.out(x.view(-1, 1440)), dim=1)


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 5, 1, 2), nn.Conv2d(16, 16, 3, 1, 1)
        self.conv3 = nn.Conv2d(16, 9, 3, 1, 1)
        self.shuffle = nn.PixelShuffle(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shuffle(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))


class DLRM(nn.Module):
    """Dense features and bags of categories, and what each says of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 8, mode="sum") for _ in range(4))
        self.top = nn.Sequential(nn.Linear(18, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        x = self.bottom(dense)
        sparse = [bag(categories[:, i : i + 1]) for i, bag in enumerate(self.bags)]
        features = torch.stack([x, *sparse], dim=1)
        products = torch.bmm(features, features.transpose(1, 2))
        rows, columns = torch.tril_indices(5, 5, offset=-1)
        return torch.sigmoid(self.top(torch.cat([x, products[:, rows, columns]], dim=1)))


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, nodes: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
        scale = graph.sum(-1).rsqrt()
        graph = scale.unsqueeze(-1) * graph * scale.unsqueeze(-2)
        hidden = F.relu(graph @ self.first(nodes))
        return F.log_softmax(graph @ self.second(hidden), dim=-1)


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, kernel_size=8, stride=8)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16) * 0.02)
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.encoder(x + self.positions)[:, 0])
