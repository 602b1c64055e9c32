"""Draws with the packed model, judges what it drew, and lays out the contact sheet.

    python -m demo.judge --tokenizer ComfyUI/comfy/sd1_tokenizer --contact-sheet demo/contact_sheet.png

It generates with the narrow UNet, which is the same function as the shipped one (`python -m demo.unpack --verify`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from . import captions
from .classifier import LABELS, classify
from .diffusion import sample
from .networks import load_text_encoder, load_unet, load_vae
from .seed import SEED_PATH
from .text import Tokenizer

FIRST_SEED = 900_000
"""Seeds from here on were not used while the model was developed."""


class Painter:
    """The packed model, from prompts and seeds to images.

    Args:
        tokenizer: ComfyUI's folder `comfy/sd1_tokenizer`.
        guidance_scale, steps: of the DDIM sampler.
    """

    def __init__(
        self, tokenizer: Path, seed_file: Path = SEED_PATH, guidance_scale: float = 4.0, steps: int = 25
    ) -> None:
        self.tokenizer = Tokenizer(tokenizer)
        self.unet, self.text = load_unet(seed_file), load_text_encoder(seed_file)
        self.decoder = load_vae(seed_file)[1]
        self.guidance_scale, self.steps = guidance_scale, steps

    @torch.no_grad()
    def __call__(self, prompts: list[str], seeds: list[int], size: int = 64) -> np.ndarray:
        """Returns images [B, size, size, 3] uint8, one per prompt and seed."""
        shape = (4, size // 8, size // 8)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        context, neutral = self.text(self.tokenizer(prompts)), self.text(self.tokenizer([""]))
        latents = sample(self.unet, context, neutral, noise, self.guidance_scale, self.steps)
        images = self.decoder(latents).clamp(0, 1)
        return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


def accuracy(painter: Painter, prompt: str, klass: str, count: int) -> tuple[float, dict[str, int]]:
    """Returns the share of `count` images judged to be of the class, and what the others were taken for."""
    images = painter([prompt] * count, list(range(FIRST_SEED, FIRST_SEED + count)))
    seen = classify(images).argmax(-1).tolist()
    wrong = [LABELS[n] for n in seen if LABELS[n] != klass]
    return 1 - len(wrong) / count, {name: wrong.count(name) for name in dict.fromkeys(wrong)}


def report(painter: Painter, count: int) -> str:
    """Returns a table: accuracy for each class by name, by synonyms, and in scenes."""
    lines, totals = [], []
    for klass in captions.CLASSES:
        by_name, wrong = accuracy(painter, f"a photo of the {klass}", klass, count)
        synonyms = captions.SYNONYMS[klass]
        by_synonym = [accuracy(painter, f"a photo of the {w}", klass, count // 2)[0] for w in synonyms]
        places = [accuracy(painter, f"a {klass} {p}", klass, count // 5)[0] for p in captions.PLACES.values()]
        totals.append((by_name, float(np.mean(by_synonym)), float(np.mean(places))))
        words = " ".join(f"{w} {a:.2f}" for w, a in zip(synonyms, by_synonym, strict=True))
        lines.append(f"{klass:11s} {by_name:.2f}  {words:40s} in scenes {totals[-1][2]:.2f}  {wrong or ''}")
    mean = np.array(totals).mean(axis=0)
    lines.append(f"mean: by name {mean[0]:.3f}, by synonym {mean[1]:.3f}, in scenes {mean[2]:.3f}")
    return "\n".join(lines)


def sheet_rows() -> list[tuple[str, str]]:
    """Returns the contact sheet's rows, each a prompt for its left and one for its right half."""
    rows = [(f"a photo of the {c}",) * 2 for c in captions.CLASSES]
    scenes = [f"a photo of the {s}" for s in captions.SCENES]
    in_scene = [
        *("a cat in the forest", "a dog on the beach", "a car on the street", "a ship on the sea"),
        *("a horse in the field", "a bird in the sky", "a frog in the snow", "a truck in the desert"),
    ]
    both = scenes + in_scene
    return rows + list(zip(both[::2], both[1::2], strict=True))


def contact_sheet(painter: Painter, path: Path, columns: int = 10, zoom: int = 2) -> None:
    """Writes rows of images under their prompts: classes, scenes, objects in scenes."""
    rows, half = sheet_rows(), columns // 2
    cell, margin, label = 64 * zoom, 4, 22
    sheet = Image.new("RGB", (columns * (cell + margin) + margin, len(rows) * (cell + label + margin)), "white")
    pen = ImageDraw.Draw(sheet)
    seeds = list(range(FIRST_SEED + 100, FIRST_SEED + 100 + columns))
    for r, (left, right) in enumerate(rows):
        images = painter([left] * half + [right] * half, seeds)
        top = r * (cell + label + margin)
        pen.text((margin, top + 2), left, fill="black", font_size=15)
        if right != left:
            pen.text((margin + half * (cell + margin), top + 2), right, fill="black", font_size=15)
        for c, image in enumerate(images):
            big = Image.fromarray(image).resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(big, (margin + c * (cell + margin), top + label))
    sheet.save(path, optimize=True)


def main() -> None:
    """Prints the table, and writes the contact sheet when asked."""
    parser = argparse.ArgumentParser(prog="python -m demo.judge", description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="ComfyUI's folder comfy/sd1_tokenizer")
    parser.add_argument("--seed-file", type=Path, default=SEED_PATH)
    parser.add_argument("--count", type=int, default=20, help="images per class (default: %(default)s)")
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--contact-sheet", type=Path, help="write the sheet here")
    options = parser.parse_args()
    painter = Painter(options.tokenizer, options.seed_file, options.cfg, options.steps)
    if options.contact_sheet:
        contact_sheet(painter, options.contact_sheet)
    if options.count:
        sys.stdout.write(report(painter, options.count) + "\n")


if __name__ == "__main__":
    main()
