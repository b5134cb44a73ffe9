"""Train the demo's diffusion transformers by flow matching, first for all noise levels, then separately as two experts.

    python -m training.dit --task t2v --minutes 5 --runs training/runs --out OUT
    python -m training.dit --task i2v --minutes 4 --runs training/runs --out OUT

Text to video also trains the text encoder, which is frozen once the experts train separately. Image to video starts
from the text-to-video weights of the shared stage, with new input channels at zero. x_sigma = (1 - sigma) x0 + sigma
noise and the velocity is noise - x0, as in the engine. Reads runs/vae/vae.safetensors and, for i2v, runs/t2v/.

Writes text.safetensors (bfloat16 values), shared, high and low .safetensors (float16, averaged weights).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightx2v.models.dit import WanDiT

from .captions import caption
from .latents import Pool, condition, open_pool, open_vae, test_set
from .model import I2V, T2V, fast, matrices, new_dit, speed_up_training, widen
from .optim import Average, Clock, Muon, Optimizers, learning_rate
from .sample import BOUNDARY, GUIDANCE, SHIFT, Experts, describe, judge, noise, sample_base
from .text import Captions, Text, tokenise
from .tokenizer import build_tokenizer
from .vae import autocast
from .world import COMBINATIONS, Clips, held_out

POOL = 49_152
DROP = 0.1  # share of empty prompts
TEXT = "text.safetensors"
PARTS = {"shared": 0.6, "high": 0.4, "low": 1.0}  # of the time that is left when a stage begins, after compiling
FORKED = ("high", "low")
RANGES = {  # sigma from, to, and the shift that spreads samples over it
    "shared": (0.0, 1.0, 4.0),
    "high": (0.86, 1.0, 5.0),
    "low": (0.0, 0.91, 3.0),
}


def draw_sigma(count: int, stage: str, device: torch.device) -> Tensor:
    """Uniform in the engine's shifted schedule, within the stage's range; one in twenty of the high ones is 1."""
    low, high, shift = RANGES[stage]
    inverse = [value / (shift - (shift - 1) * value) for value in (low, high)]
    u = inverse[0] + (inverse[1] - inverse[0]) * torch.rand(count, device=device)
    sigma = shift * u / (1 + (shift - 1) * u)
    if high == 1.0:
        sigma = torch.where(torch.rand(count, device=device) < 0.05, 1.0, sigma)
    return sigma


def flow_loss(dit: WanDiT, x0: Tensor, sigma: Tensor, context: Tensor, given: Tensor | None) -> Tensor:
    share = sigma[:, None, None, None, None]
    start = torch.randn_like(x0)
    predicted = dit.forward_batch((1 - share) * x0 + share * start, 1000 * sigma, context, given)
    return (predicted - (start - x0)).square().mean()


class Run:
    """What all stages of one task share: data, captions, the test set, the place for results."""

    def __init__(self, task: str, runs: Path, out: Path | None, batch: int, seed: int, pool: int) -> None:
        self.task, self.batch, self.seed, self.out = task, batch, seed, out
        self.folder = runs / task
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.log = (self.folder / f"{task}.log").open("a")
        self.clock = Clock(1.0)
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")
        speed_up_training()
        vae_path = runs / "vae" / "vae.safetensors"
        images = task == "i2v"
        self.pool: Pool = open_pool(vae_path, runs / "cache", pool, seed, self.device, images=images, say=self.say)
        self.vae = open_vae(vae_path, self.device)
        self.captions = Captions(self.device, seed)
        self.say("captions and pool are ready")
        self._test_set(256 if self.device.type == "cuda" else 4)

    def say(self, text: str) -> None:
        line = f"[{self.clock.total:6.1f} s] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def keep(self, name: str, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float16) -> None:
        path = self.folder / f"{name}.safetensors"
        save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}, path)
        self.hand_out(path)

    def hand_out(self, path: Path) -> None:
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.out / path.name)

    def _test_set(self, count: int) -> None:
        """Prompts, half of them for combinations that are not in training."""
        every, generator = torch.arange(COMBINATIONS), torch.Generator().manual_seed(self.seed + 99)
        seen, unseen = every[~held_out(every)], every[held_out(every)]
        half = count // 2
        combination = torch.cat(
            [part[torch.randperm(len(part), generator=generator)[:half]] for part in (seen, unseen)]
        )
        chance = random.Random(self.seed + 98)
        self.unseen = torch.arange(count) >= half
        self.clips: Clips
        self.clips, self.frames, self.images = test_set(self.vae, combination, self.seed + 97, self.device)
        prompts = [caption(self.clips.words(i), chance) for i in range(count)]
        self.prompts = tokenise(prompts).to(self.device)
        self.noise = noise(count, self.device, self.seed + 96)

    @torch.no_grad()
    def test(self, text: Text, experts: Experts, **changes: object) -> dict[str, float]:
        given = self.images if self.task == "i2v" else None
        context = text(self.prompts)
        empty = text(self.captions.unconditional[1:].expand(len(context), -1))
        settings = {"shift": SHIFT[self.task], "boundary": BOUNDARY[self.task], "guidance": GUIDANCE[self.task]}
        latents = sample_base(experts, self.noise, context, empty, given, **(settings | changes))  # pyright: ignore[reportArgumentType]
        return judge(self.vae, latents, self.clips, self.unseen, self.frames if self.task == "i2v" else None)

    def draw(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents, caption ids, condition."""
        index = torch.randint(len(self.pool), (self.batch,), device=self.device)
        ids = self.captions.draw(self.pool.combination[index], DROP)
        given = None if self.pool.images is None else condition(self.pool.images[index].float())
        return self.pool.latents[index].float(), ids, given


def compiled_call(
    run: Run, loss: Callable[..., Tensor], dit: WanDiT, batch: Callable[[], tuple[Tensor | None, ...]], enabled: bool
) -> Callable[..., Tensor]:
    """`loss(dit, *batch())`, compiled if this machine can."""
    if not enabled or run.device.type != "cuda":
        return loss
    faster = torch.compile(loss, dynamic=False)
    start = time.perf_counter()
    try:
        with autocast(run.device):
            faster(dit, *batch()).backward()
        dit.zero_grad(set_to_none=True)
        run.say(f"compiled in {time.perf_counter() - start:.0f} s")
        return faster
    except Exception as error:  # a compiler's bug must not cost the run
        run.say(f"not compiled: {type(error).__name__}: {str(error)[:300]}")
        return loss


def fit(
    run: Run,
    stage: str,
    dit: WanDiT,
    text: Text,
    end: float,
    steps: int | None,
    rates: tuple[float, float],
    compiled: bool,
) -> WanDiT:
    """Train one stage; return the averaged model. The text encoder trains unless it is frozen.

    `end` is when all stages must be done, in seconds of the run's clock.
    """
    learns_text = next(text.parameters()).requires_grad
    inside, rest = matrices(dit)
    words = list(text.parameters()) if learns_text else []
    fused = run.device.type == "cuda"
    optimizer = Optimizers(
        Muon(inside, lr=rates[0], weight_decay=0.01),
        torch.optim.AdamW([*rest, *words], lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0, fused=fused),
    )
    both = nn.ModuleList([dit, *([text] if learns_text else [])])

    def batch() -> tuple[Tensor | None, ...]:
        x0, ids, given = run.draw()
        return x0, draw_sigma(run.batch, stage, run.device), text(ids), given

    loss_of = compiled_call(run, flow_loss, dit, batch, compiled)
    clock = Clock(max(PARTS[stage] * (end - run.clock.total) / 60, 0.05), steps)
    average = Average(both, 0.999 if stage == "shared" else 0.998)
    report, keep = clock.every(20), clock.every(60)
    total, count = torch.zeros((), device=run.device), 0

    def write() -> None:
        parts = {"0.": (stage, torch.float16), "1.": ("text", torch.bfloat16)}
        for prefix, (name, dtype) in parts.items():
            found = {key.removeprefix(prefix): v for key, v in average.weights.items() if key.startswith(prefix)}
            if found:
                run.keep(name, found, dtype)

    while not clock.done:
        with autocast(run.device):
            loss = loss_of(dit, *batch())
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step(learning_rate(clock.progress, warmup=0.02, flat=0.4))
        average.update(both)
        total += loss.detach()
        count += 1
        clock.tick()
        if report.due():
            rate = clock.step * run.batch / clock.elapsed
            run.say(f"{stage} step {clock.step} ({rate:.0f} samples/s) loss {total.item() / count:.4f}")
            total.zero_()
            count = 0
        if keep.due():
            write()
    average.copy_to(both)
    write()
    run.say(f"{stage}: {clock.step} steps of {run.batch} in {clock.elapsed:.0f} s")
    return dit


def copy_of(dit: WanDiT, device: torch.device) -> WanDiT:
    twin = WanDiT(dit.config)
    twin.load_state_dict({name: value.detach().cpu() for name, value in dit.state_dict().items()})
    return fast(twin, device)


def load_text(folder: Path, device: torch.device) -> Text:
    tensors = load_file(folder / TEXT)
    text = Text(*tensors["embedding.weight"].shape)
    text.load_state_dict({name: value.float() for name, value in tensors.items()})
    return text.to(device).requires_grad_(False)


def load_dit(path: Path, device: torch.device) -> WanDiT:
    tensors = load_file(path)
    dit = WanDiT(T2V if tensors["patch_embedding.weight"].shape[1] == T2V.in_dim else I2V)
    dit.load_state_dict({name: value.float() for name, value in tensors.items()})
    return fast(dit, device)


def train_shared(
    run: Run, runs: Path, minutes: float, steps: int | None, rates: tuple[float, float], compiled: bool, *, resume: bool
) -> tuple[Text, WanDiT]:
    """The shared weights from which both experts start."""
    task = run.task
    if resume:
        text = load_text(runs / "t2v", run.device).requires_grad_(task == "t2v")
        shared = load_dit(run.folder / "shared.safetensors", run.device)
    elif task == "t2v":
        text = Text(build_tokenizer().get_vocab_size()).to(run.device)
        shared = new_dit(T2V, run.device)
    else:
        shutil.copyfile(runs / "t2v" / TEXT, run.folder / TEXT)  # t2v may be trained on later; its text moves then
        text = load_text(run.folder, run.device)
        shared = widen(load_dit(runs / "t2v" / "shared.safetensors", run.device))
    run.say(f"{minutes - run.clock.total / 60:.2f} minutes are left for training, batch {run.batch}")
    fit(run, "shared", shared, text, 60 * minutes, steps, rates, compiled)
    if task == "t2v":
        with torch.no_grad():
            for parameter in text.parameters():  # the file holds bfloat16: the experts shall know it so
                parameter.copy_(parameter.bfloat16().float())
        text.requires_grad_(False)
    run.say("shared, 20 steps: " + describe(run.test(text, {"high": shared, "low": shared})))
    return text, shared


def train(
    task: str,
    runs: Path,
    out: Path | None,
    minutes: float,
    *,
    steps: int | None,
    batch: int,
    seed: int,
    compiled: bool,
    rates: tuple[float, float],
    pool: int,
    resume: str | None,
) -> float:
    """Returns the share of test clips on which the experts got everything right."""
    run = Run(task, runs, out, batch, seed, pool)
    if resume == "experts":
        text = load_text(run.folder, run.device)
        experts: Experts = {stage: load_dit(run.folder / f"{stage}.safetensors", run.device) for stage in FORKED}
        run.say("before, 20 steps: " + describe(run.test(text, experts)))
    else:
        text, shared = train_shared(run, runs, minutes, steps, rates, compiled, resume=resume == "shared")
        experts = {stage: copy_of(shared, run.device) for stage in FORKED}
    for stage, dit in experts.items():
        forked = (rates[0] * 0.5, rates[1] * 0.5)
        experts[stage] = fit(run, stage, dit, text, 60 * minutes, steps, forked, compiled)
    result = {"experts": run.test(text, experts)}
    run.say("experts, 20 steps: " + describe(result["experts"]))
    variations: dict[str, dict[str, object]] = {
        "guidance 1": {"guidance": (1.0, 1.0)},
        "guidance 2": {"guidance": (2.0, 2.0)},
        "guidance 6": {"guidance": (6.0, 6.0)},
        "shift 3": {"shift": 3.0},
        "shift 5": {"shift": 5.0},
        "shift 8": {"shift": 8.0},
        "40 steps": {"steps": 40},
    }
    for name, changes in variations.items():
        result[name] = run.test(text, experts, **changes)
        run.say(f"{name}: {describe(result[name])}")
    (run.folder / f"{task}.json").write_text(json.dumps(result, indent=1))
    run.hand_out(run.folder / f"{task}.json")
    run.hand_out(run.folder / f"{task}.log")
    return result["experts"]["all"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=("t2v", "i2v"), required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="encoding the pool included")
    parser.add_argument("--steps", type=int, help="of each stage, instead of minutes")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=POOL)
    parser.add_argument("--runs", type=Path, default=Path("training/runs"))
    parser.add_argument("--out", type=Path, help="a second place for the results")
    parser.add_argument("--rates", type=float, nargs=2, default=(8e-3, 1.5e-3), metavar=("MUON", "ADAMW"))
    parser.add_argument("--resume", choices=("shared", "experts"), help="go on from these of runs/<task>")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--require", type=float, default=0.0, help="exit with 3 if the experts score less")
    args = parser.parse_args()
    score = train(
        args.task,
        args.runs,
        args.out,
        args.minutes,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        compiled=not args.no_compile,
        rates=tuple(args.rates),
        pool=args.pool,
        resume=args.resume,
    )
    if score < args.require:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
