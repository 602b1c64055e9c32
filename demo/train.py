"""Trains the demo model and packs it: one command, resumable, CPU or GPU.

    python -m demo.train --icons node_modules/@iconify-json --tokenizer ComfyUI/comfy/sd1_tokenizer --work work

Stages, in order: `draw` artwork, `vae`, `latents`, `unet` (with the text encoder), `decoder` (on the frozen encoder),
`classifier`, `pack`. Each writes checkpoints into the work folder and continues from them; `--stage` runs one alone, so
that `decoder` and `unet` can share a machine. Inference needs none of this.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import artwork, captions, vae
from .classifier import CLASSIFIER_PATH, LABELS, RESOLUTION, Classifier, classify, save_classifier
from .diffusion import TRAIN_STEPS, add_noise, alphas_cumprod, min_snr_weight
from .networks import load_vae
from .seed import SEED_PATH, write_seed
from .text import EOS, POSITIONS, TextEncoder, Tokenizer, pad_tokens
from .unet import UNet

log = logging.getLogger("demo.train")

STAGES = ("draw", "vae", "latents", "unet", "decoder", "classifier", "pack")
UNKNOWN_TOKEN = 0
"""Stands for any word that has no embedding of its own."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained. Step counts and batch are those of the shipped model."""

    icons: Path
    tokenizer: Path
    work: Path
    destination: Path = Path(__file__).parent
    device: str = "cpu"
    resolution: int = 64
    pictures: int = 60_000
    vae_steps: int = 3_200
    unet_steps: int = 4_500
    decoder_steps: int = 1_000
    classifier_steps: int = 1_500
    decay_from: float = 0.6
    captions_per_batch: int = 16
    pictures_per_caption: int = 4
    learning_rate: float = 1e-3
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resolution % 16:
            raise ValueError(f"expected a resolution divisible by 16 but got {self.resolution}")


def decayed(step: int, steps: int, rate: float, decay_from: float, warm_up: int = 100) -> float:
    """Returns the learning rate: a short warm-up, constant, then a cosine to 2 % over the rest."""
    progress = min(1.0, max(0.0, (step / steps - decay_from) / (1 - decay_from)))
    return rate * min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's learning rate to its own `base` times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def save(path: Path, state: dict) -> None:
    """Writes a checkpoint so that an interruption leaves the old one whole."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(path)


def load(path: Path, device: str) -> dict:
    """Returns a checkpoint written by `save`, or an empty dict."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else {}


def to_input(pictures: np.ndarray, device: str) -> Tensor:
    """Returns uint8 images [B, H, W, 3] as floats [B, 3, H, W] in 0..1."""
    batch = torch.from_numpy(np.array(pictures)).to(device)
    return batch.permute(0, 3, 1, 2).float().div_(255).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- draw


def draw(s: Settings) -> None:
    """Draws the training images and 1000 more for testing, once."""
    for name, count, seed in (("train", s.pictures, s.seed + 1), ("test", 1000, s.seed + 2)):
        path = s.work / f"{name}_pictures.npy"
        if path.exists():
            continue
        pictures, classes, scenes = artwork.draw_set(artwork.Icons(s.icons), count, s.resolution, seed)
        np.save(s.work / f"{name}_labels.npy", np.stack([classes, scenes]))
        np.save(path, pictures)
        log.info("drew %d %s images", count, name)


def pictures_of(s: Settings, name: str) -> np.ndarray:
    """Returns the drawn images of one set, mapped from disk."""
    return np.load(s.work / f"{name}_pictures.npy", mmap_mode="r")


# ---------------------------------------------------------------- autoencoder


def train_vae(s: Settings) -> None:
    """Trains encoder and decoder together; the encoder is frozen afterwards."""
    _train_autoencoder(s, s.work / "vae.pt", s.vae_steps, encoder_too=True)


def train_decoder(s: Settings) -> None:
    """Goes on with the decoder alone, on the frozen encoder, with stronger latent noise of random size."""
    _train_autoencoder(s, s.work / "decoder.pt", s.decoder_steps, encoder_too=False)


def _train_autoencoder(s: Settings, path: Path, steps: int, encoder_too: bool, batch: int = 32) -> None:
    pictures = pictures_of(s, "train")
    test = to_input(pictures_of(s, "test")[:256], s.device)
    encoder, decoder = vae.Encoder().to(s.device), vae.Decoder().to(s.device)
    state = load(path, s.device)
    if not state and not encoder_too:
        state = {k: v for k, v in load(s.work / "vae.pt", s.device).items() if k in ("encoder", "decoder")}
    if state:
        encoder.load_state_dict(state["encoder"])
        decoder.load_state_dict(state["decoder"])
    encoder.requires_grad_(encoder_too)
    parameters = [p for m in (encoder, decoder) for p in m.parameters() if p.requires_grad]
    rate = 1.6e-3 if encoder_too else 1e-3
    optimizer = torch.optim.AdamW([{"params": parameters, "base": 1.0}], rate, betas=(0.9, 0.99), weight_decay=1e-3)
    if state.get("optimizer"):
        optimizer.load_state_dict(state["optimizer"])
    step, began = state.get("step", 0), time.monotonic()
    rng = np.random.default_rng([s.seed, step])
    while step < steps:
        set_rate(optimizer, decayed(step, steps, rate, 0.3))
        start = int(rng.integers(len(pictures) - batch))  # the images are independent, so a run of them is a sample
        target = to_input(pictures[start : start + batch], s.device)
        with torch.autocast(s.device.split(":")[0], torch.bfloat16):
            latent = encoder(target).float()
            spread = 0.07 if encoder_too else 0.15 * torch.rand(batch, 1, 1, 1, device=s.device)
            output = decoder(latent + spread * torch.randn_like(latent)).float()
        loss = vae.reconstruction_loss(output, target)
        if encoder_too:  # keep each latent channel near zero mean and unit variance
            mean, std = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
            loss = loss + 0.01 * mean.square().sum() + 0.01 * (std - 1).square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 200 == 0 or step == steps:
            with torch.no_grad(), torch.autocast(s.device.split(":")[0], torch.bfloat16):
                quality = vae.psnr(decoder(encoder(test)).float(), test)
            log.info("%s step %d, %.0f s: psnr %.2f dB", path.stem, step, time.monotonic() - began, quality)
            models = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
            save(path, {**models, "optimizer": optimizer.state_dict(), "step": step})


@torch.no_grad()
def encode_latents(s: Settings) -> None:
    """Encodes every training image once with the frozen encoder."""
    path = s.work / "latents.npy"
    if path.exists():
        return
    encoder = vae.Encoder().to(s.device)
    encoder.load_state_dict(load(s.work / "vae.pt", s.device)["encoder"])
    pictures = pictures_of(s, "train")
    parts = []
    for i in range(0, len(pictures), 250):
        with torch.autocast(s.device.split(":")[0], torch.bfloat16):
            parts.append(encoder(to_input(pictures[i : i + 250], s.device)).float().cpu().numpy())
    latents = np.concatenate(parts)
    np.save(path, latents.astype(np.float16))
    log.info("latents: mean %.3f, std %.3f", latents.mean(), latents.std())


# ---------------------------------------------------------------- captions as batches


class CaptionedLatents:
    """Draws batches in which a few captions each go with a few latents, so that text is encoded once per caption."""

    def __init__(self, s: Settings, latents: Tensor, labels: np.ndarray) -> None:
        self.s, self.latents = s, latents
        tokenizer = Tokenizer(s.tokenizer)
        self.groups: list[tuple[int, int]] = []
        self.members: list[np.ndarray] = []
        self.words: list[list[list[int]]] = []
        shares = []
        for c in range(-1, len(captions.CLASSES)):
            for k in range(-1, len(captions.SCENES)):
                members = np.flatnonzero((labels[0] == c) & (labels[1] == k))
                if (c, k) == (-1, -1) or not len(members):
                    continue
                klass = captions.CLASSES[c] if c >= 0 else None
                scene = captions.SCENES[k] if k >= 0 else None
                self.groups.append((c, k))
                self.members.append(members)
                self.words.append([tokenizer.words(text) for text in captions.all_captions(klass, scene)])
                shares.append(0.5 / 10 if k < 0 else 0.15 / 10 if c < 0 else 0.35 / 100)
        self.shares = np.array(shares) / np.sum(shares)
        self.vocabulary = sorted({t for group in self.words for words in group for t in words})

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns latents [U * R, ...], tokens [U, 77], content mask [U, 77] (True: a word) and labels [U, 2].

        Args:
            count: U, the number of captions; each goes with R images.
        """
        repeat = self.s.pictures_per_caption
        chosen, tokens, content, labels = [], [], [], []
        for group in rng.choice(len(self.groups), size=count, p=self.shares):
            if rng.random() < 0.1:  # the empty caption, or words that mean nothing, for any image
                words = [UNKNOWN_TOKEN] * int(rng.integers(1, 9)) if rng.random() < 0.3 else []
                chosen.append(rng.integers(len(self.latents), size=repeat))
                labels.append((-1, -1))
            else:
                words = list(self.words[group][rng.integers(len(self.words[group]))])
                if rng.random() < 0.12:  # a word that means nothing, somewhere
                    words.insert(int(rng.integers(len(words) + 1)), UNKNOWN_TOKEN)
                chosen.append(rng.choice(self.members[group], size=repeat))
                labels.append(self.groups[group])
            tokens.append(pad_tokens(words))
            content.append(torch.arange(POSITIONS).clamp(max=len(words) + 1) % (len(words) + 1) > 0)
        rows = torch.from_numpy(np.concatenate(chosen))
        return self.latents[rows].float(), torch.stack(tokens), torch.stack(content), torch.tensor(labels) + 1


# ---------------------------------------------------------------- UNet and text encoder


def train_unet(s: Settings) -> None:
    """Trains UNet and text encoder together on the latents; keeps an exponential moving average of both."""
    path = s.work / "unet.pt"
    latents = torch.from_numpy(np.load(s.work / "latents.npy"))
    data = CaptionedLatents(s, latents, np.load(s.work / "train_labels.npy"))
    torch.manual_seed(s.seed)
    models = nn.ModuleDict({"unet": UNet(), "text": TextEncoder(data.vocabulary), "probe": LabelProbe()}).to(s.device)
    average = copy.deepcopy(models).requires_grad_(False)
    groups = [{"params": list(m.parameters()), "base": 1.0} for m in models.values()]
    optimizer = torch.optim.AdamW(groups, s.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    state = load(path, s.device)
    if state:
        models.load_state_dict(state["models"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    step, began, losses = state.get("step", 0), time.monotonic(), []
    first = step
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        torch.distributed.init_process_group("gloo")
    rng = np.random.default_rng([s.seed, step, rank])
    torch.manual_seed(s.seed + 1000 * step + rank)
    samples = state.get("samples", step * s.captions_per_batch * s.pictures_per_caption)
    alphas = alphas_cumprod().to(s.device)
    while step < s.unet_steps:
        set_rate(optimizer, decayed(step, s.unet_steps, s.learning_rate, s.decay_from))
        with torch.autocast(s.device.split(":")[0], torch.bfloat16):
            batch = data.batch(rng, s.captions_per_batch // processes)
            loss, probe_loss = unet_loss(models, [t.to(s.device) for t in batch], alphas)
        (loss + 0.05 * probe_loss).backward()
        share_gradients(models)
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        samples += s.captions_per_batch * s.pictures_per_caption
        keep = min(s.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(models.parameters()), 1 - keep)
        losses.append((loss.item(), probe_loss.item()))
        if rank == 0 and (step % 250 == 0 or step == s.unet_steps):
            pace = (step - first) / (time.monotonic() - began)
            mean, probe_mean = np.mean(losses, axis=0)
            log.info("unet step %d, %.2f steps/s: loss %.4f, labels %.3f", step, pace, mean, probe_mean)
            losses.clear()
            both = {"models": models.state_dict(), "average": average.state_dict()}
            counts = {"step": step, "samples": samples, "vocabulary": data.vocabulary}
            save(path, {**both, **counts, "optimizer": optimizer.state_dict()})


def share_gradients(models: nn.Module) -> None:
    """Averages gradients over the processes of `torchrun`, if there are several."""
    if torch.distributed.is_initialized():
        gradients = [p.grad for p in models.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


class LabelProbe(nn.Module):
    """Reads class and scene off a text state; training only, so that synonyms come to share a meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.klass = nn.Linear(768, len(captions.CLASSES) + 1)
        self.scene = nn.Linear(768, len(captions.SCENES) + 1)

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Returns the cross-entropy of both readings; labels [U, 2], 0 for none."""
        return F.cross_entropy(self.klass(states), labels[:, 0]) + F.cross_entropy(self.scene(states), labels[:, 1])


def unet_loss(models: nn.ModuleDict, batch: list[Tensor], alphas: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the min-SNR weighted eps loss and the probe's loss of one batch of `CaptionedLatents`."""
    latent, tokens, content, labels = batch
    device = latent.device
    context = models["text"](tokens)
    ends = (tokens == EOS).int().argmax(-1)
    pads = ends + (torch.rand(len(ends), device=device) * (POSITIONS - ends)).long()
    every = torch.arange(len(ends), device=device)
    probe_loss = sum(models["probe"](context[every, at], labels) for at in (ends, pads))
    # in a fifth of the samples the words themselves are hidden, so that end and padding carry the meaning
    rows = every.repeat_interleave(len(latent) // len(tokens))
    hidden = torch.rand(len(rows), device=device) < 0.2
    mask = ~(content[rows] & hidden[:, None])[:, None, None, :]
    count = len(rows)
    strata = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    times = (strata * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)
    noise = torch.randn_like(latent)
    predicted = models["unet"](add_noise(latent, noise, alphas[times]), times, context, rows, mask).float()
    error = (predicted - noise).square().mean((1, 2, 3))
    return (min_snr_weight(alphas[times]) * error).mean(), probe_loss


# ---------------------------------------------------------------- classifier


def draw_classified(s: Settings, count: int, held_out: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns varied images of every glyph (or the held-out vendor's) with class numbers."""
    rng = np.random.default_rng(seed)
    glyphs = artwork.classifier_glyphs(artwork.Icons(s.icons), held_out)
    names = [(c, g) for c in captions.CLASSES for g in glyphs[c]]
    weights = np.array([1 / len(glyphs[c]) for c, _ in names])
    chosen = rng.choice(len(names), size=count, p=weights / weights.sum())
    pictures = np.empty((count, RESOLUTION, RESOLUTION, 3), np.uint8)
    for i, number in enumerate(chosen):
        scene = captions.SCENES[rng.integers(len(captions.SCENES))] if rng.random() < 0.45 else None
        ground = artwork.draw_scene(rng, scene, RESOLUTION)
        picture = artwork.paste_glyph(rng, ground, names[number][1], (0.6, 0.95), rotation=10, shift=0.06)
        pictures[i] = np.asarray(picture)
    return pictures, np.array([captions.CLASSES.index(names[n][0]) for n in chosen])


def draw_scenes(count: int, seed: int) -> np.ndarray:
    """Returns plain scenes and plain grounds."""
    rng = np.random.default_rng(seed)
    names = (*captions.SCENES, None, None)
    return np.stack([np.asarray(artwork.draw_scene(rng, names[rng.integers(12)], RESOLUTION)) for _ in range(count)])


def blur(x: Tensor, factor: int) -> Tensor:
    """Returns images averaged over `factor` pixels and enlarged again."""
    return F.interpolate(F.avg_pool2d(x, factor), x.shape[-2:], mode="bilinear", align_corners=False)


def make_other(objects: Tensor, scenes: Tensor) -> Tensor:
    """Returns images of nothing, as many as `objects`: scenes, noise, blends, scrambled and melted objects."""
    count = len(objects)
    kind = torch.randint(7, (count,))
    out = scenes[torch.randint(len(scenes), (count,))].clone()
    coarse = torch.rand(count, 3, 8, 8)
    noise = F.interpolate(coarse, out.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
    turned = torch.roll(objects, 1, 0)
    blocks = objects.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3)[:, :, torch.randperm(16)]
    scrambled = blocks.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(objects.shape)
    melted = blur(objects, 16)
    variants = {
        2: noise,
        3: 0.5 * objects + 0.5 * turned.flip(-2),
        4: scrambled,
        5: melted,
        6: 0.25 * objects + 0.75 * torch.where(torch.rand(count, 1, 1, 1) < 0.5, noise, blur(turned, 8)),
    }
    for number, pictures in variants.items():
        out[kind == number] = pictures[kind == number]
    return out


def disturb(x: Tensor) -> Tensor:
    """Returns images with random flips, colour gains, greys, hue swaps, blur and noise."""
    count = len(x)
    coin = torch.rand(6, count, 1, 1, 1)
    x = torch.where(coin[0] < 0.5, x.flip(-1), x)
    x = (x * (0.75 + 0.5 * torch.rand(count, 3, 1, 1)) + 0.2 * (torch.rand(count, 3, 1, 1) - 0.5)).clamp(0, 1)
    x = torch.where(coin[1] < 0.2, x[:, torch.randperm(3)], x)
    x = torch.where(coin[2] < 0.15, x.mean(1, keepdim=True), x)
    x = torch.where(coin[3] < 0.4, blur(x, 2), x)
    x = torch.where(coin[4] < 0.1, blur(x, 4), x)
    return torch.where(coin[5] < 0.4, x + 0.05 * torch.randn_like(x), x).clamp(0, 1)


def train_classifier(s: Settings) -> None:
    """Trains the judge on every vendor but one and logs its accuracy on that one."""
    torch.manual_seed(s.seed)
    pictures, classes = draw_classified(s, 24_000, held_out=False, seed=s.seed + 3)
    scenes = to_input(draw_scenes(2_000, s.seed + 4), "cpu")
    model = Classifier()
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "base": 1.0}], 2e-3, weight_decay=5e-2)
    rng = np.random.default_rng(s.seed)
    for step in range(s.classifier_steps):
        set_rate(optimizer, decayed(step, s.classifier_steps, 2e-3, 0.3))
        rows = rng.integers(len(pictures), size=80)
        objects = to_input(pictures[rows], "cpu")
        batch = disturb(torch.cat([objects, make_other(objects[:24], scenes)]))
        target = torch.cat([torch.from_numpy(classes[rows]), torch.full((24,), LABELS.index("other"))])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            log.info("classifier step %d: loss %.3f", step + 1, loss.item())
    save_classifier(model, s.destination / CLASSIFIER_PATH.name)
    report_classifier(s)


def report_classifier(s: Settings) -> None:
    """Logs the shipped classifier's accuracy on artwork of the vendor that it never saw, and on images of nothing."""
    torch.manual_seed(s.seed + 5)
    pictures, classes = draw_classified(s, 1_000, held_out=True, seed=s.seed + 5)
    path = s.destination / CLASSIFIER_PATH.name
    right = (classify(pictures, path).argmax(-1).numpy() == classes).astype(float)
    for number, name in enumerate(captions.CLASSES):
        log.info("held-out vendor, %s: %.3f", name, right[classes == number].mean())
    other = make_other(to_input(pictures, "cpu"), to_input(draw_scenes(300, s.seed + 6), "cpu"))
    rejected = (classify(other, path).argmax(-1) == LABELS.index("other")).float().mean().item()
    log.info("held-out vendor, all: %.3f; images of nothing called other: %.3f", right.mean(), rejected)


# ---------------------------------------------------------------- pack


def pack(s: Settings) -> None:
    """Writes the seed file from the averaged weights."""
    unet = load(s.work / "unet.pt", "cpu")
    encoder = load(s.work / "vae.pt", "cpu")["encoder"]
    decoder = (load(s.work / "decoder.pt", "cpu") or load(s.work / "vae.pt", "cpu"))["decoder"]
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "text": {}, "probe": {}}
    for name, value in unet["average"].items():
        part, key = name.split(".", 1)
        parts[part][key] = value
    notes = {"resolution": str(s.resolution), "unet_steps": str(unet["step"]), "unet_samples": str(unet["samples"])}
    path = s.destination / SEED_PATH.name
    write_seed(path, parts["unet"], parts["text"], unet["vocabulary"], encoder, decoder, notes)
    packed_encoder, packed_decoder = load_vae(path)
    pictures = pictures_of(s, "test")
    batches = [to_input(pictures[i : i + 100], "cpu") for i in range(0, len(pictures), 100)]
    with torch.no_grad():
        quality = np.mean([vae.psnr(packed_decoder(packed_encoder(x)), x) for x in batches])
    log.info("packed %.1f MB into %s, autoencoder %.2f dB", path.stat().st_size / 1e6, path.name, quality)


# ---------------------------------------------------------------- command line


def parse(arguments: list[str] | None = None) -> tuple[Settings, tuple[str, ...]]:
    """Returns the settings and the stages to run."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description="Train and pack the demo model.")
    parser.add_argument("--icons", type=Path, required=True, help="folder node_modules/@iconify-json")
    parser.add_argument("--tokenizer", type=Path, required=True, help="ComfyUI's folder comfy/sd1_tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediates and checkpoints")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone (default: all, in order)")
    options = (("destination", Path), ("device", str), ("resolution", int), ("pictures", int), ("seed", int))
    for name, kind in options:
        parser.add_argument(f"--{name}", type=kind, default=getattr(Settings, name), help="default: %(default)s")
    for name in ("vae_steps", "unet_steps", "decoder_steps", "classifier_steps"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(Settings, name), help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads")
    chosen = vars(parser.parse_args(arguments))
    stage, threads = chosen.pop("stage"), chosen.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    return Settings(**chosen), (stage,) if stage else STAGES


def main() -> None:
    """Runs the chosen stages."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    settings, stages = parse()
    for folder in (settings.work, settings.destination):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    runners = {
        "draw": draw,
        "vae": train_vae,
        "latents": encode_latents,
        "unet": train_unet,
        "decoder": train_decoder,
        "classifier": train_classifier,
        "pack": pack,
    }
    for stage in stages:
        runners[stage](settings)


if __name__ == "__main__":
    main()
