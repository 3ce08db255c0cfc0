"""Trains the embedded toy model `flux.2-tiny`, from nothing, on pictures that it draws itself.

    python scripts/toy.py runs/tiny --compile --export flux/tiny
    python scripts/toy.py runs/more --export flux/tiny --start-from flux/tiny --autoencoder-minutes 0

In turn: a tokenizer, pictures, the autoencoder, the pictures' latents, the transformer with its text encoder, and the decoder
once more. What is in the run's folder is not made again, and a network whose training was stopped goes on from its last
checkpoint. Lengths are minutes, not steps: the learning rates follow the clock, so a run ends when it was told to, on any
machine. Loss logs (CSV) and contact sheets (PNG) appear in the folder as it goes. The second command trains the embedded model
further, on its own latents.
"""

import argparse
import copy
import csv
import itertools
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from flux import sampling, shapes, training
from flux.autoencoder import AutoEncoder, pack
from flux.configs import MODELS
from flux.language_model import LanguageModel
from flux.training import load, take, write
from flux.transformer import Flux

SPEC = MODELS["flux.2-tiny"]
AE_EDGES = ("conv_in", "conv_out", "quant_conv")  # layers at the edges of a network are not for Muon
EDGES = ("img_in", "txt_in", "time_in", "modulation", "final_layer", "embed_tokens")


# ---------------------------------------------------------------- the training loop, for either network


class Trainer:
    """Optimises `model` for some minutes of training time: clock-driven warm-up and cosine, EMA, checkpoints, a loss log."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], path: Path, minutes: float, ema: float):
        self.model, self.optimizers, self.path, self.minutes, self.decay = model, optimizers, path, minutes, ema
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
        self.step, self.seconds = 0, 0.0
        self.device = next(model.parameters()).device
        self.dtype = torch.bfloat16 if bfloat16_is_faster(self.device) else torch.float32
        if path.exists():
            self.restore()

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / (60 * self.minutes))

    def run(self, loss: Callable[[int], Tensor], every_minutes: float = 5, sheet: Callable[[], None] = lambda: None):
        """`loss(step)` draws a batch and returns its loss; `sheet()` is called with the EMA weights in place."""
        bar = tqdm(total=round(60 * self.minutes), initial=round(self.seconds), unit="s", desc=self.path.stem, mininterval=5)
        marked, losses = self.seconds, []
        while self.progress < 1:
            started = time.monotonic()
            value = self.update(loss)
            if not math.isfinite(value):
                raise SystemExit(f"{self.path.stem}: the loss is {value} at step {self.step}; go on from {self.path}")
            losses.append(value)
            spent = time.monotonic() - started
            self.seconds += spent
            bar.update(spent)
            if self.step % 100 == 0:
                bar.set_postfix(step=self.step, loss=f"{np.mean(losses):.4f}")
                with open(self.path.with_suffix(".csv"), "a", newline="") as log:
                    csv.writer(log).writerow([self.step, f"{self.seconds:.1f}", f"{np.mean(losses):.6f}"])
                losses = []
            if self.seconds - marked > 60 * every_minutes or self.progress == 1:
                marked = self.seconds
                self.save()
                with self.averaged():
                    sheet()
        self.model.load_state_dict(self.ema)

    def update(self, loss: Callable[[int], Tensor]) -> float:
        """One step of all optimizers, and of the average."""
        rate = min(1.0, (self.step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
        with training.computing(self.device, self.dtype):
            value = loss(self.step)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        training.follow(self.ema, self.model.state_dict(), self.decay, self.step)
        return value.item()

    @contextmanager
    def averaged(self):
        """The EMA weights stand in the model."""
        live = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        yield
        self.model.load_state_dict(live)

    def save(self):
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for i, optimizer in enumerate(self.optimizers):
            tensors |= training.optimizer_tensors(optimizer, f"optimizer.{i}.")
        write(self.path, tensors, {"step": str(self.step), "seconds": repr(self.seconds)})

    def restore(self):
        with safe_open(self.path, framework="pt") as f:
            tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        self.model.load_state_dict(take(tensors, "model."))
        self.ema = take(tensors, "ema.")
        for i, optimizer in enumerate(self.optimizers):
            training.restore_optimizer(optimizer, take(tensors, f"optimizer.{i}."))


def bfloat16_is_faster(device: torch.device) -> bool:
    """Tried out: on some CPUs it is four times as fast as float32, on others several times slower."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(1024, 1024, dtype=dtype, device=device)
        for _ in range(3):  # the last one counts
            start = time.perf_counter()
            (a @ a).sum().item()
        return time.perf_counter() - start

    return seconds(torch.bfloat16) < seconds(torch.float32)


class Muon(torch.optim.Optimizer):
    """Momentum whose update, seen as a matrix, is made orthogonal (Jordan et al. 2024; step size as in Liu et al. 2025).

    torch.optim.Muon does the same in bfloat16 and for matrices only; here convolution kernels are flattened, and float32 is
    several times faster on CPUs without bf16 units.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike = defaultdict(list)  # matrices of one shape take their steps together: many small products are slow
            for p in group["params"]:
                alike[p.shape].append(p)
            for parameters in alike.values():
                updates = []
                for p in parameters:
                    average = self.state[p].setdefault("momentum", torch.zeros_like(p.grad))
                    average.lerp_(p.grad, 1 - momentum)
                    updates.append(p.grad.lerp(average, momentum).flatten(1))  # Nesterov's look ahead
                updates = orthogonal(torch.stack(updates))
                scale = 0.2 * math.sqrt(max(updates.shape[1:]))  # the size of a typical Adam update
                for p, update in zip(parameters, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).sub_(update.view_as(p), alpha=lr * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: five steps of a quintic Newton-Schulz iteration on the singular values."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # (N, rows, columns)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def optimizers(model: nn.Module, muon: float, adam: float, plain: tuple[str, ...]) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels; AdamW for vectors, and for what `plain` names: layers that touch pixels or tokens.

    `muon` and `adam` are their learning rates.
    """
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.ndim >= 2 and not any(part in name for part in plain)]
    outer = [p for _, p in named if not any(p is q for q in inner)]
    return [Muon(inner, muon, weight_decay=0.01), torch.optim.AdamW(outer, adam, (0.9, 0.99), weight_decay=0.0)]


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> np.ndarray:
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def contact_sheet(path: Path, pictures: np.ndarray, columns: int):
    rows = [np.concatenate(list(pictures[i : i + columns]), axis=1) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


# ---------------------------------------------------------------- the autoencoder


def busy_picture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Overlapping shapes in any colours on a gradient: what the autoencoder should survive beyond the grammar."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    ramp = ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None]
    picture = rng.uniform(0, 255, 3).astype(np.float32) * ramp + rng.uniform(0, 255, 3).astype(np.float32) * (1 - ramp)
    picture = np.broadcast_to(picture, (size, size, 3))
    for _ in range(rng.integers(2, 7)):
        shape, radius = str(rng.choice(list(shapes.SHAPES))), rng.uniform(0.08, 0.3) * size
        x, y = rng.uniform(0, size, 2)
        alpha = shapes.coverage(shape, x, y, radius, size, size)[..., None]
        picture = picture * (1 - alpha) + rng.uniform(0, 255, 3).astype(np.float32) * alpha
    return np.rint(picture).astype(np.uint8)


def train_autoencoder(run: Path, minutes: float, device: torch.device, start: Path | None, count: int = 3000) -> AutoEncoder:
    """L1 and edges, a light KL; 64-pixel crops (four times the pictures a second), and whole pictures for the last sixth."""
    torch.manual_seed(0)
    model = AutoEncoder(SPEC.autoencoder)
    with torch.no_grad():  # start with little posterior noise: at unit variance nothing gets through for hundreds of steps
        model.encoder.quant_conv.bias[SPEC.autoencoder.z_channels :] -= 6
    if start:
        model.load_state_dict(load(start / "ae.safetensors"))
    model.to(device, memory_format=torch.channels_last)
    if not minutes:
        return model

    rng = np.random.default_rng(0)
    data = load(run / "pictures-128x128.safetensors")["pictures"][:count].numpy().copy()
    for i in range(0, len(data), 4):
        data[i] = busy_picture(rng, 128)
    trainer = Trainer(model, optimizers(model, 2e-3, 2e-3, AE_EDGES), run / "autoencoder.safetensors", minutes, ema=0.998)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((1, step))
        size, batch = (64, 8) if trainer.progress < 5 / 6 else (128, 2)
        corner = lambda: rng.integers(0, 129 - size, 2)  # noqa: E731
        crops = [data[i, y : y + size, x : x + size] for i in rng.integers(0, len(data), batch) for y, x in [corner()]]
        return autoencoder_loss(model, to_pixels(np.stack(crops)).to(device, memory_format=torch.channels_last))

    def sheet():
        with torch.no_grad():
            pixels = to_pixels(data[:8]).to(device)
            decoded = model.decoder(model.encoder(pixels).chunk(2, 1)[0])
        contact_sheet(run / "autoencoder.png", to_pictures(torch.cat([pixels, decoded])), 8)
        print(f"\nPSNR {10 * math.log10(4 / F.mse_loss(decoded.clamp(-1, 1), pixels).item()):.1f} dB")

    trainer.run(loss, sheet=sheet)
    measure_statistics(model, np.delete(data, np.s_[::4], axis=0)[:1024])
    return model


def autoencoder_loss(model: AutoEncoder, pixels: Tensor) -> Tensor:
    mean, log_variance = model.encoder(pixels).chunk(2, dim=1)  # (B, z, h, w) each
    log_variance = log_variance.clamp(-30, 20)
    decoded = model.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return picture_loss(decoded, pixels) + 3e-4 * kl


def picture_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1, of the pixels and of the differences between neighbours: sharp edges are worth more than exact greys."""
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 0.5 * edges


def train_decoder(run: Path, minutes: float, device: torch.device, autoencoder: AutoEncoder):
    """The decoder alone, on whole pictures and their exact latents: these stay as they are, so the transformer fits still."""
    data = {**load(run / "pictures-128x128.safetensors"), **load(run / "latents-128x128.safetensors")}
    decoder = autoencoder.decoder.requires_grad_(True)
    trainer = Trainer(decoder, optimizers(decoder, 2e-3, 1e-3, AE_EDGES), run / "decoder.safetensors", minutes, ema=0.998)

    def loss(step: int) -> Tensor:
        rows = np.random.default_rng((3, step)).integers(0, len(data["latents"]), 2)
        pixels = to_pixels(data["pictures"][rows].numpy()).to(device, memory_format=torch.channels_last)
        return picture_loss(autoencoder.decode(data["latents"][rows].to(device)), pixels)

    trainer.run(loss)
    decoder.requires_grad_(False)


@torch.no_grad()
def measure_statistics(model: AutoEncoder, pictures: np.ndarray):
    """The running statistics that FLUX.2 normalises packed latents with, measured over pictures."""
    device = model.bn.running_mean.device
    packed = torch.cat([pack(model.encoder(to_pixels(p).to(device)).chunk(2, 1)[0]) for p in np.array_split(pictures, 256)])
    model.bn.running_mean.copy_(packed.mean((0, 2, 3)))
    model.bn.running_var.copy_(packed.var((0, 2, 3)))


# ---------------------------------------------------------------- the tokenizer and the pictures


def train_tokenizer(run: Path):
    """On the grammar's captions: any text has ids, and a word of the grammar has one."""
    some = shapes.scenes(0, held=None)
    texts = ["user\nassistant\n\n"] * 4000 + [str(next(some)) for _ in range(4000)]
    (run / "tokenizer").mkdir(parents=True, exist_ok=True)
    train_byte_level_bpe(texts, SPEC.text.model.vocab_size, run / "tokenizer" / "tokenizer.json")


def train_byte_level_bpe(texts: list[str], vocab_size: int, path: Path):
    """Trains byte-level BPE of `vocab_size` tokens, and writes and returns it: a tokenizer.json in Qwen's format.

    As in Qwen's vocabulary, the special tokens come last; `<think>` and `</think>` are added tokens, but not special.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from flux.tokenizers import QWEN_WORDS, QwenTokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [QwenTokenizer.pad, "<|im_start|>", "<|im_end|>"]
    added = [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    size = vocab_size - len(special) - len(added)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    tokenizer.save(str(path))
    return tokenizer


BUCKETS = {(128, 128): 24000, (160, 96): 3000, (96, 160): 3000}  # width, height: pictures


def draw_pictures(run: Path):
    """Scenes that are not held out, with their captions' ids, one file a size."""
    from flux.tokenizers import QwenTokenizer

    tokenizer = QwenTokenizer(run / "tokenizer")
    for number, ((width, height), count) in enumerate(BUCKETS.items()):
        rng, some = np.random.default_rng(number), shapes.scenes(100 + number, held=False)
        drawn = np.empty((count, height, width, 3), np.uint8)
        captions = []
        for i in tqdm(range(count), desc=f"drawing {width}x{height}", mininterval=5):
            scene = next(some)
            captions.append(str(scene))
            drawn[i] = shapes.draw(scene, width, height, rng)
        tokens = tokenizer(captions, SPEC.text_length)
        if any(tokens.cut):
            raise SystemExit(f"{max(captions, key=len)!r} does not fit {SPEC.text_length} tokens")
        write(run / f"pictures-{width}x{height}.safetensors",
              {"pictures": torch.from_numpy(drawn), "ids": tokens.ids, "mask": tokens.mask})  # fmt: skip


# ---------------------------------------------------------------- the transformer and its text encoder


@torch.no_grad()
def encode_latents(run: Path, model: AutoEncoder):
    """Each picture's latents, once: the autoencoder is fixed from here on."""
    device = model.bn.running_mean.device
    dtype = torch.bfloat16 if bfloat16_is_faster(device) else torch.float32
    model = copy.deepcopy(model).to(dtype, memory_format=torch.channels_last)
    for width, height in BUCKETS:
        data = load(run / f"pictures-{width}x{height}.safetensors")
        batches = tqdm(data.pop("pictures").split(8), desc=f"encoding {width}x{height}", mininterval=5)
        latents = [model.encode(to_pixels(p.numpy()).to(device, dtype, memory_format=torch.channels_last)) for p in batches]
        data["latents"] = torch.cat(latents).float().cpu()  # (N, C, h, w)
        write(run / f"latents-{width}x{height}.safetensors", data)


class Networks(nn.Module):
    """What is trained together: the transformer, and the language model whose hidden states it reads."""

    def __init__(self):
        super().__init__()
        self.transformer = Flux(SPEC.transformer)
        self.text = LanguageModel(SPEC.text.model)
        for name, p in self.named_parameters():
            if "modulation" in name or "final_layer" in name:
                nn.init.zeros_(p)  # every block starts as the identity (adaLN-zero, Peebles & Xie 2022)

    def velocity(self, x: Tensor, t: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Latents (B, C, h, w) at times t (B,), prompts' ids and mask (B, T) -> velocity (B, C, h, w)."""
        txt = self.text(ids, mask)
        axes = len(SPEC.transformer.axes_dim)
        img_ids, txt_ids = sampling.image_ids(*x.shape[2:], axes), sampling.text_ids(ids.shape[1], axes)
        velocity = self.transformer(rearrange(x, "b c h w -> b (h w) c"), img_ids, txt, txt_ids, t)
        return rearrange(velocity, "b (h w) c -> b c h w", h=x.shape[2])


def rectified_flow_loss(networks: Networks, latents: Tensor, ids: Tensor, mask: Tensor, shift: float = 4.0) -> Tensor:
    """Mean squared error of the velocity along straight lines from noise, at logit-normal times (Esser et al. 2024).

    `shift` moves the times towards noise, where the sampler's are too: there it is decided what the picture shows.
    """
    t = training.shifted_times(torch.randn(len(latents), device=latents.device), math.log(shift))  # (B,)
    velocity = lambda x, t: networks.velocity(x, t, ids, mask)  # noqa: E731
    return training.rectified_flow_loss(velocity, latents, t, torch.randn_like(latents))


def train_transformer(
    run: Path, minutes: float, device: torch.device, start: Path | None, autoencoder: AutoEncoder,
    compiled: bool, batch: int = 128, dropped: float = 0.1,
) -> Networks:  # fmt: skip
    """`dropped` captions are replaced by the empty one, so that classifier-free guidance is possible."""
    from flux.tokenizers import QwenTokenizer

    torch.manual_seed(0)
    buckets = [load(run / f"latents-{width}x{height}.safetensors") for width, height in BUCKETS]
    share = np.array([len(b["latents"]) for b in buckets], float)
    empty = QwenTokenizer(run / "tokenizer")([""], SPEC.text_length)
    networks = Networks()
    if start:
        networks.transformer.load_state_dict(load(start / "flux-2-tiny.safetensors"))
        networks.text.load_state_dict(take(load(start / "text_encoder" / "model.safetensors"), "model."))
    networks.to(device)
    if compiled:  # block by block: what one compiled, the next ones use
        for block in [*networks.transformer.double_blocks, *networks.transformer.single_blocks, *networks.text.layers]:
            block.compile(dynamic=False)
    trainer = Trainer(networks, optimizers(networks, 3e-3, 1e-3, EDGES), run / "transformer.safetensors", minutes, ema=0.998)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((2, step))
        data = buckets[rng.choice(len(buckets), p=share / share.sum())]
        rows = torch.from_numpy(rng.integers(0, len(data["latents"]), batch))
        drop = torch.from_numpy(rng.random(batch) < dropped)[:, None]
        ids, mask = torch.where(drop, empty.ids, data["ids"][rows]), torch.where(drop, empty.mask, data["mask"][rows])
        return rectified_flow_loss(networks, *(x.to(device) for x in (data["latents"][rows], ids, mask)))

    def sheet():
        scenes = list(itertools.islice(shapes.scenes(7, held=True, complete=True), 48))
        pictures = sample(networks, autoencoder, QwenTokenizer(run / "tokenizer"), [str(s) for s in scenes])
        contact_sheet(run / "transformer.png", pictures, 12)
        report = shapes.score(pictures, scenes)
        print("\n" + "  ".join(f"{k} {v:.0%}" for k, v in report.items()), flush=True)

    trainer.run(loss, sheet=sheet)
    return networks


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # too few passes to pay for another compilation
def sample(networks: Networks, autoencoder: AutoEncoder, tokenizer, prompts: list[str], seed: int = 0) -> np.ndarray:
    """Pictures of prompts, as the pipeline samples them, but for guidance."""
    device = autoencoder.bn.running_mean.device
    ids, mask = (x.to(device) for x in tokenizer(prompts, SPEC.text_length)[:2])
    side = SPEC.size // 16
    x = sampling.noise(range(seed, seed + len(prompts)), SPEC.autoencoder.latent_channels, side, side, spatial=False).to(device)
    times = sampling.schedule(SPEC.schedule, SPEC.steps, side * side)
    velocity = lambda x, t: networks.velocity(x, torch.full((len(x),), t, device=device), ids, mask)  # noqa: E731
    return to_pictures(autoencoder.decode(sampling.denoise(velocity, x, times)))


def export(run: Path, target: Path, autoencoder: AutoEncoder, networks: Networks):
    """The embedded model's files, bfloat16, in the layout of a FLUX.2 klein repository."""
    parts = {"flux-2-tiny": networks.transformer, "ae": autoencoder, "text_encoder/model": networks.text}
    for name, module in parts.items():
        path = target / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        halves = {k: v.cpu().to(torch.bfloat16) if v.is_floating_point() else v for k, v in module.state_dict().items()}
        prefix = "model." if name.startswith("text_encoder") else ""  # as the released Qwen3 files have it
        write(path, {prefix + k: v for k, v in halves.items()}, {"format": "pt"})
    (target / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(run / "tokenizer" / "tokenizer.json", target / "tokenizer" / "tokenizer.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder for checkpoints, logs and sheets")
    parser.add_argument("--autoencoder-minutes", type=float, default=30)
    parser.add_argument("--transformer-minutes", type=float, default=120)
    parser.add_argument("--decoder-minutes", type=float, default=10, help="on the autoencoder's decoder alone, at the end")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="nearly twice as fast on a CPU; needs a C++ compiler")
    parser.add_argument("--start-from", type=Path, metavar="FOLDER", help="weights to begin with, as --export wrote them")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="where the finished model goes (flux/tiny)")
    args = parser.parse_args()
    if not args.autoencoder_minutes and not args.start_from:
        parser.error("--autoencoder-minutes 0 keeps an autoencoder as it is: say whose, with --start-from FOLDER")
    torch.set_flush_denormal(True)  # SiLU's tails are denormal numbers, on which a CPU is ten times slower
    run = args.run
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "tokenizer" / "tokenizer.json").exists():
        if args.start_from:
            shutil.copytree(args.start_from / "tokenizer", run / "tokenizer")
        else:
            train_tokenizer(run)
    if not all((run / f"pictures-{w}x{h}.safetensors").exists() for w, h in BUCKETS):
        draw_pictures(run)
    autoencoder = train_autoencoder(run, args.autoencoder_minutes, args.device, args.start_from).requires_grad_(False)
    if not all((run / f"latents-{w}x{h}.safetensors").exists() for w, h in BUCKETS):
        encode_latents(run, autoencoder)
    networks = train_transformer(run, args.transformer_minutes, args.device, args.start_from, autoencoder, args.compile)
    train_decoder(run, args.decoder_minutes, args.device, autoencoder)
    if args.export:
        export(run, args.export, autoencoder, networks)


if __name__ == "__main__":
    main()
