"""Train the demo model's VAE: the engine's WanVAE, base width 16, on clips that are drawn during training.

    python -m training.vae --minutes 8.5 --out runs/vae

Loss: L1 + L2, weighted towards edges, plus a small KL term. One clip in eight is like the condition of image-to-video:
an image followed by grey frames. The VAE is causal, so every 17-frame clip also trains its prefixes of 1, 5, 9 and 13
frames; some clips have 33 frames so that longer ones do not drift. At the end the latents' mean and deviation are
folded into conv1 and conv2, so that Wan's published constants normalise this VAE's latents.

Writes vae.safetensors (float16, averaged weights, folded) every two minutes and vae_resume.safetensors (float32).
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import LATENT_MEAN, LATENT_STD, VAEConfig

from .detector import score
from .optim import Average, Clock, Muon, Optimizers, learning_rate
from .world import FRAMES, Clips, render, sample_clips

CONFIG = VAEConfig(dim=16, res_blocks=1)
KL_WEIGHT = 1e-4
EDGE_WEIGHT = 4.0
CONDITION_SHARE = 8  # one clip in so many is an image and grey frames
COMPILE_SECONDS = 150
LONG_SHARE = 12  # one batch in so many has clips of 33 frames


def new_vae(config: VAEConfig = CONFIG) -> WanVAE:
    """Residual branches start at zero and latents at unit scale, so training starts from nearly a linear codec."""
    vae = WanVAE(config)
    for name, parameter in vae.named_parameters():
        if name.endswith((".residual.6.weight", ".residual.6.bias", ".proj.weight", ".proj.bias")):
            nn.init.zeros_(parameter)
    with torch.no_grad():
        spread, centre = torch.tensor(LATENT_STD), torch.tensor(LATENT_MEAN)
        z = config.z_dim
        vae.conv1.weight[:z] *= 3 * spread[:, None, None, None, None]
        vae.conv1.bias[:z] = centre
        vae.conv1.weight[z:] *= 0.1
        vae.conv1.bias[z:] = 2 * spread.log() - 4
        vae.conv2.weight /= spread[None, :, None, None, None]
    return vae


class Reconstruction(nn.Module):
    """Weighted error, KL divergence and squared error of a batch, in one graph that can be compiled."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.vae.encode_clip(video)
        log_variance = log_variance.clamp(-20, 4)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        error = self.vae.decode_clip(latents) - video
        weight = edge_weight(video)
        loss = (weight * (error.abs() + error.square())).mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return loss + KL_WEIGHT * divergence, error.detach().square().mean()


def edge_weight(video: Tensor) -> Tensor:
    """1 on flat areas, up to 1 + EDGE_WEIGHT within two pixels of an edge, then scaled to a mean of one: B 1 T H W."""
    batch = video.shape[0]
    frames = video.transpose(1, 2).flatten(0, 1)
    down = F.pad((frames[:, :, 1:] - frames[:, :, :-1]).abs().sum(1, keepdim=True), (0, 0, 0, 1))
    across = F.pad((frames[:, :, :, 1:] - frames[:, :, :, :-1]).abs().sum(1, keepdim=True), (0, 1, 0, 0))
    edges = F.max_pool2d((down + across).clamp(max=1), 5, stride=1, padding=2)
    weight = 1 + EDGE_WEIGHT * edges
    weight = weight / weight.mean()
    return weight.unflatten(0, (batch, -1)).transpose(1, 2)


class Batches:
    """Yield random clips on the device without end; draws many at a time because kernel launches limit drawing."""

    def __init__(self, batch: int, device: torch.device, seed: int, pool: int = 8) -> None:
        self.batch, self.device, self.pool = batch, device, pool
        self.generator = torch.Generator().manual_seed(seed)
        self.ready: list[Tensor] = []

    def next(self) -> Tensor:
        if not self.ready:
            clips = sample_clips(self.batch * self.pool, self.generator, split="all", random_phase=True)
            self.ready = list(render(clips, FRAMES, device=self.device).split(self.batch))
        video = self.ready.pop()
        images = math.ceil(self.batch / CONDITION_SHARE)
        video[:images, :, 1:] = 0
        return video

    def next_long(self) -> Tensor:
        clips = sample_clips(self.batch // 2, self.generator, split="all", random_phase=True)
        return render(clips, 2 * FRAMES - 1, device=self.device)


def optimizers(vae: WanVAE, muon_rate: float, adam_rate: float) -> Optimizers:
    """Muon for the convolutions inside, AdamW for the first and last ones, biases and gains."""
    outer = ("encoder.conv1.", "encoder.head.", "decoder.head.", "conv1.", "conv2.")
    inside, rest = [], []
    for name, parameter in vae.named_parameters():
        (
            inside
            if parameter.dim() > 3
            and min(parameter.shape[:2]) > 3
            and not name.startswith(outer)
            and not name.endswith("gamma")
            else rest
        ).append(parameter)
    fused = rest[0].is_cuda
    return Optimizers(
        Muon(inside, lr=muon_rate),
        torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=fused),
    )


def to_layout(vae: nn.Module, channels_last: bool) -> None:
    for parameter in vae.parameters():
        if parameter.dim() in (4, 5) and parameter.shape[0] > 1 and channels_last:
            layout = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
            parameter.data = parameter.data.to(memory_format=layout)
        else:
            parameter.data = parameter.data.contiguous()


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _too_long(*_: object) -> None:
    raise TimeoutError(f"compiling took more than {COMPILE_SECONDS} s")


Step = Callable[[Tensor], tuple[Tensor, Tensor]]


def fastest(vae: WanVAE, video: Tensor, allow_compile: bool, say: Callable[[str], None]) -> tuple[Step, bool]:
    """Time forward and backward in each memory layout, plain and compiled; return the best one and its layout."""
    device = video.device
    plain = Reconstruction(vae)
    if device.type != "cuda":
        return plain, False

    def seconds(step: Step, layout: bool, repeats: int) -> float:
        to_layout(vae, layout)
        clip = video.contiguous(memory_format=torch.channels_last_3d) if layout else video.contiguous()
        for i in range(repeats + 2):
            if i == 2:
                torch.cuda.synchronize()
                start = time.perf_counter()
            with autocast(device):
                loss, _ = step(clip)
            loss.backward()
            vae.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    speeds = {layout: seconds(plain, layout, 3) for layout in (True, False)}
    layout = speeds[True] <= speeds[False]
    say(f"forward and backward: channels last {speeds[True]:.3f} s, contiguous {speeds[False]:.3f} s")
    best: Step = plain
    if allow_compile:
        start = time.perf_counter()
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(COMPILE_SECONDS)
        try:
            compiled = torch.compile(plain, dynamic=False)
            speed = seconds(compiled, layout, 3)
            say(f"compiled {speed:.3f} s, compiling took {time.perf_counter() - start:.0f} s")
            if speed < speeds[layout]:
                best = compiled
        except Exception as error:  # a compiler's bug must not cost the run
            say(f"not compiled: {type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.alarm(0)
    to_layout(vae, layout)
    return best, layout


@torch.no_grad()
def reconstruct(vae: WanVAE, video: Tensor, batch: int = 32) -> Tensor:
    with autocast(video.device):
        return torch.cat([vae.decode_clip(vae.encode_clip(part)[0]).clamp(-1, 1) for part in video.split(batch)])


@torch.no_grad()
def evaluate(vae: WanVAE, clips: Clips, video: Tensor) -> dict[str, float]:
    """Decibels and detector scores on whole clips, decibels of the image-to-video condition's first frame."""
    again = reconstruct(vae, video)
    image = video.clone()
    image[:, :, 1:] = 0
    image_again = reconstruct(vae, image[:16])
    result = {"dB": decibels(again, video), "dB_image": decibels(image_again[:, :, :1], image[:16, :, :1])}
    return result | score(again, clips)


def decibels(a: Tensor, b: Tensor) -> float:
    """Mean over clips of the peak signal-to-noise ratio, values in [-1, 1]."""
    error = ((a - b) / 2).square().flatten(1).mean(1).clamp(min=1e-10)
    return (-10 * error.log10()).mean().item()


@torch.no_grad()
def fold_statistics(vae: WanVAE, video_batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Fold the latents' mean and deviation per channel into conv1 and conv2, so that latents have mean 0 and variance
    1."""
    with autocast(video_batches[0].device):
        latents = torch.cat([vae.encode_clip(video)[0] for video in video_batches])
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    centre = torch.tensor(LATENT_MEAN, device=mean.device)
    spread = torch.tensor(LATENT_STD, device=mean.device)
    z = vae.config.z_dim
    column = deviation[:, None, None, None, None]
    # encoder: raw' = (raw - centre - spread * mean) / deviation + centre; the decoder undoes it
    vae.conv1.weight[:z] /= column
    vae.conv1.bias[:z] = (vae.conv1.bias[:z] - centre - spread * mean) / deviation + centre
    vae.conv1.bias[z:] -= 2 * deviation.log()
    vae.conv2.bias += vae.conv2.weight[:, :, 0, 0, 0] @ (centre + spread * mean - centre * deviation)
    vae.conv2.weight *= deviation[None, :, None, None, None]
    return mean, deviation


def save(vae: WanVAE, path: Path, dtype: torch.dtype) -> None:
    part = path.with_suffix(".part")
    save_file({name: value.detach().to("cpu", dtype).contiguous() for name, value in vae.state_dict().items()}, part)
    part.replace(path)


def load_vae(path: Path, device: torch.device | str = "cpu") -> WanVAE:
    tensors = load_file(path)
    vae = WanVAE(VAEConfig.from_shapes({name: tuple(value.shape) for name, value in tensors.items()}))
    vae.load_state_dict({name: value.float() for name, value in tensors.items()})
    return vae.to(device)


def train(
    out: Path,
    minutes: float,
    *,
    steps: int | None,
    batch: int,
    seed: int,
    resume: Path | None,
    compiled: bool,
    muon_rate: float,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    clock = Clock(minutes, steps)
    log = (out / "vae.log").open("a")

    def say(text: str) -> None:
        line = f"[{clock.total:6.1f} s] {text}"
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    vae = (load_vae(resume) if resume else new_vae()).to(device)
    average_vae = WanVAE(vae.config).to(device)
    size = sum(p.numel() for p in vae.parameters())
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(f"{machine}, torch {torch.__version__}, {size / 1e6:.2f} M weights")
    batches = Batches(batch, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    count = 64 if device.type == "cuda" else 2  # on a CPU only to see it run
    test_clips = sample_clips(count, generator, split="all")
    test_video = render(test_clips, device=device)
    start = time.perf_counter()
    batches.next()
    say(f"drawing {batch * batches.pool} clips took {time.perf_counter() - start:.3f} s")
    say(f"detector on real clips {score(test_video, test_clips)['all']:.3f}")

    step, layout = fastest(vae, batches.next(), compiled, say)
    plain = Reconstruction(vae)
    optimizer = optimizers(vae, muon_rate, 4e-3)
    average = Average(vae, 0.998)
    memory_format = torch.channels_last_3d if layout else torch.contiguous_format
    squared = torch.zeros((), device=device)
    seen = 0
    clock.restart()
    report, keep = clock.every(30), clock.every(100)
    say(f"training for {clock.seconds / 60:.2f} minutes, batch {batch}")

    def finish(final: bool) -> dict[str, float]:
        average.copy_to(average_vae)
        save(average_vae, out / "vae_resume.safetensors", torch.float32)
        many = sample_clips(16 * count, torch.Generator().manual_seed(seed + 2), split="train")
        mean, deviation = fold_statistics(average_vae, [render(part, device=device) for part in _split(many, 64)])
        save(average_vae, out / "vae.safetensors", torch.float16)
        exported = load_vae(out / "vae.safetensors", device)
        clips = sample_clips(8 * count if final else count, torch.Generator().manual_seed(seed + 3), split="all")
        parts = [evaluate(exported, part, render(part, device=device)) for part in _split(clips, 64)]
        result = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        result |= {"steps": clock.step, "clips": clock.step * batch, "minutes": clock.total / 60}
        result |= {"latent_std_before_folding": deviation.mean().item()}
        (out / "vae.json").write_text(json.dumps(result, indent=1))
        return result

    while not clock.done:
        long = clock.step % LONG_SHARE == LONG_SHARE - 1 and clock.progress > 0.05
        video = (batches.next_long() if long else batches.next()).contiguous(memory_format=memory_format)
        with autocast(device):
            loss, square = (plain if long else step)(video)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(learning_rate(clock.progress))
        average.update(vae)
        squared += square
        seen += 1
        clock.tick()
        if report.due():
            average.copy_to(average_vae)
            result = evaluate(average_vae, test_clips, test_video)
            train_db = 10 * math.log10(4 / (squared.item() / seen))
            text = " ".join(f"{name} {value:.3f}" for name, value in result.items())
            say(f"step {clock.step} ({clock.step / clock.elapsed:.2f}/s) train {train_db:.2f} dB, average: {text}")
            squared.zero_()
            seen = 0
        if keep.due() and not clock.done:
            finish(final=False)
    say("final, float16, folded: " + json.dumps(finish(final=True)))


def _split(clips: Clips, size: int) -> list[Clips]:
    return [clips[start : start + size] for start in range(0, len(clips), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--steps", type=int, help="instead of minutes: exactly so many")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("training/runs/vae"))
    parser.add_argument("--resume", type=Path, help="vae_resume.safetensors of an earlier run")
    parser.add_argument("--muon-rate", type=float, default=6e-3)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    train(
        args.out,
        args.minutes,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        resume=args.resume,
        compiled=not args.no_compile,
        muon_rate=args.muon_rate,
    )


if __name__ == "__main__":
    main()
