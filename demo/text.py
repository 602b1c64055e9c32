"""The demo's text encoder: CLIP-L's shape with two real causal layers, and its tokenizer.

Only the first two of CLIP's twelve layers do anything, with low-rank projections, so that the seed file stays small.
They mix context, so padding positions carry the prompt's meaning as in real CLIP. Words that were never in a caption
have a zero embedding. It does not know images.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import TEXT_LAYERS, TEXT_MLP_WIDTH, TEXT_WIDTH, VOCABULARY
from .unet import attend

HEADS = 12
POSITIONS = 77
BOS, EOS = 49406, 49407
RANK = 64


class LowRank(nn.Module):
    """A linear layer through `RANK` dimensions, with bias."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, TEXT_WIDTH) / TEXT_WIDTH**0.5)
        self.up = nn.Parameter(torch.randn(TEXT_WIDTH, RANK) * gain / RANK**0.5)
        self.bias = nn.Parameter(torch.zeros(TEXT_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up, self.bias)


class Layer(nn.Module):
    """A causal pre-LayerNorm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(TEXT_WIDTH), nn.LayerNorm(TEXT_WIDTH)
        self.q_proj, self.k_proj, self.v_proj = LowRank(1.0), LowRank(1.0), LowRank(1.0)
        self.out_proj = LowRank(0.0)
        self.fc1 = nn.Linear(TEXT_WIDTH, TEXT_MLP_WIDTH)
        self.fc2 = nn.Linear(TEXT_MLP_WIDTH, TEXT_WIDTH)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer_norm1(x)
        q, k, v = (p(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attend(q, k, v, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril())
        x = x + self.out_proj(mixed.transpose(1, 2).flatten(2))
        h = self.fc1(self.layer_norm2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h))


class TextEncoder(nn.Module):
    """Token numbers [B, 77] of a small vocabulary to text states [B, 77, 768].

    Args:
        vocabulary: CLIP token numbers that have an embedding; every other token is the zero row 0.
    """

    def __init__(self, vocabulary: list[int]) -> None:
        super().__init__()
        self.token_embedding = nn.Parameter(0.3 * torch.randn(len(vocabulary), TEXT_WIDTH))
        self.position_embedding = nn.Parameter(0.1 * torch.randn(POSITIONS, TEXT_WIDTH))
        self.layers = nn.ModuleList([Layer() for _ in range(TEXT_LAYERS)])
        self.final_layer_norm = nn.LayerNorm(TEXT_WIDTH)
        self.rows: Tensor
        rows = torch.zeros(VOCABULARY, dtype=torch.long)
        rows[torch.tensor(vocabulary)] = torch.arange(1, len(vocabulary) + 1)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the text states of CLIP token numbers [B, 77]."""
        table = torch.cat([self.token_embedding.new_zeros(1, TEXT_WIDTH), self.token_embedding])
        x = table[self.rows[tokens]] + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class Tokenizer:
    """ComfyUI's CLIP byte-pair tokenizer, without its weights-in-brackets syntax.

    Args:
        folder: ComfyUI's `comfy/sd1_tokenizer` (vocab.json and merges.txt). Needs `transformers`.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPTokenizer

        self._tokenizer = CLIPTokenizer.from_pretrained(str(folder))

    def words(self, text: str) -> list[int]:
        """Returns the token numbers of the text alone."""
        return list(self._tokenizer(text)["input_ids"][1:-1])

    def __call__(self, texts: list[str]) -> Tensor:
        """Returns [len(texts), 77] token numbers, padded with the end token as ComfyUI does for SD 1.x."""
        return torch.stack([pad_tokens(self.words(t)) for t in texts])


def pad_tokens(words: list[int]) -> Tensor:
    """Returns begin token, words, end token and end-token padding, [77]."""
    row = torch.full((POSITIONS,), EOS)
    row[0] = BOS
    row[1 : len(words) + 1] = torch.tensor(words[: POSITIONS - 2], dtype=torch.long)
    return row
