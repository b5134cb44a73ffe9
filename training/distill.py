"""Distil 20 guided steps into 4 unguided ones, as a rank-16 LoRA for each expert.

    python -m training.distill --task t2v --minutes 4 --runs training/runs --out OUT

Teacher: the base model with guidance, solved by the engine's UniPC on a schedule that passes through the distilled
model's noise levels (1, .9375, .8333, .625). Its state at each level is kept. Student: from each level one Euler step
should reach the teacher's next state. It starts from the teacher's states first, and later from its own, too, so that
later steps correct the errors of earlier ones. The high-noise LoRA learns the first two steps, the low-noise LoRA the
others.

Reads runs/vae, runs/t2v and runs/<task>. Writes high_lora and low_lora .safetensors in LightX2V's naming.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightx2v.config.phases import Phase
from lightx2v.models.dit import WanDiT
from lightx2v.sampling import Schedule, UniPC

from .dit import Run, compiled_call, copy_of, load_dit, load_text
from .latents import condition
from .model import LATENT, add_lora, lora_state_dict
from .optim import Average, Clock, Optimizers, learning_rate
from .sample import BOUNDARY, DISTILL, GUIDANCE, Experts, describe, guided, judge, sample_distilled, velocity
from .text import Text
from .vae import autocast

RANK = 16
SUBSTEPS = (5, 5, 6, 8)  # of the teacher within each of the student's steps
FIRST = 0.9995  # UniPC's log-SNR is infinite at 1
TEACHER_PART = 0.3  # of the time goes into trajectories
STEPS = {"high": (0, 1), "low": (2, 3)}


def teacher_schedule(boundary: float) -> tuple[Schedule, list[int]]:
    """The teacher's schedule, and after how many of its steps each of the student's levels is reached."""
    levels = [FIRST, *DISTILL.sigmas[1:]]
    sigmas, reached = [FIRST], []
    for substeps, (here, there) in zip(SUBSTEPS, zip(levels[:-1], levels[1:], strict=True), strict=True):
        sigmas += [here + (there - here) * (i + 1) / substeps for i in range(substeps)]
        reached.append(len(sigmas) - 1)
    timesteps = [1000 * sigma for sigma in sigmas[:-1]]
    phases = (Phase(expert="high"), Phase(expert="low", below_timestep=1000 * boundary))
    return Schedule.of(sigmas, timesteps, phases), reached


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """N of the teacher's: states at the student's five levels (float16), caption ids, image latents."""

    states: Tensor
    ids: Tensor
    images: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)


@torch.no_grad()
def teach(
    run: Run, text: Text, experts: Experts, guidance: tuple[float, float], seconds: float, limit: int
) -> Trajectories:
    schedule, reached = teacher_schedule(BOUNDARY[run.task])
    clock = Clock(seconds / 60)
    found: list[Trajectories] = []
    while (not clock.done or not found) and len(found) * run.batch < limit:
        index = torch.randint(len(run.pool), (run.batch,), device=run.device)
        ids = run.captions.draw(run.pool.combination[index], 0.0)
        images = None if run.pool.images is None else run.pool.images[index]
        given = None if images is None else condition(images.float())
        context, empty = text(ids), text(run.captions.unconditional[1:].expand(run.batch, -1))
        latents = torch.randn(run.batch, *LATENT, device=run.device)
        states = [latents.half()]
        solver = UniPC(schedule)
        for i in range(schedule.steps):
            expert = schedule.experts[i]
            scale = guidance[0] if expert == "high" else guidance[1]
            v = guided(experts[expert], latents, schedule.timesteps[i], context, empty, given, scale)
            latents = solver.step(v, i, latents)
            if i + 1 in reached:
                states.append(latents.half())
        found.append(Trajectories(states=torch.stack(states, 1), ids=ids, images=images))
    images = None if found[0].images is None else torch.cat([part.images for part in found if part.images is not None])
    whole = Trajectories(
        states=torch.cat([part.states for part in found]), ids=torch.cat([part.ids for part in found]), images=images
    )
    run.say(f"{len(whole)} trajectories in {clock.elapsed:.0f} s")
    return whole


def step_loss(
    dit: WanDiT, start: Tensor, target: Tensor, timestep: Tensor, span: Tensor, context: Tensor, given: Tensor | None
) -> Tensor:
    """Squared error of the velocity that would lead from `start` to `target` within `span`."""
    predicted = dit.forward_batch(start, timestep, context, given)
    return (predicted - (target - start) / span[:, None, None, None, None]).square().mean()


@torch.no_grad()
def own_states(run: Run, student: WanDiT, text: Text, data: Trajectories, start: Tensor, step: int) -> Tensor:
    """The student's step from `start` (N, ...): the states that it will really see next."""
    sigmas = DISTILL.sigmas
    arrived = torch.empty_like(start)
    for part in torch.arange(len(data), device=run.device).split(run.batch):
        given = None if data.images is None else condition(data.images[part].float())
        before = start[part].float()
        v = velocity(student, before, DISTILL.timesteps[step], text(data.ids[part]), given)
        arrived[part] = (before + (sigmas[step + 1] - sigmas[step]) * v).half()
    return arrived


def fit(
    run: Run,
    which: str,
    expert: WanDiT,
    text: Text,
    data: Trajectories,
    entry: Tensor,
    end: float,
    steps: int | None,
    rate: float,
    compiled: bool,
) -> tuple[WanDiT, Tensor]:
    """Trains one expert's LoRA. `entry`: the states in which the student enters; returns those in which it leaves.

    `end` is when both must be done, in seconds of the run's clock.
    """
    first, second = STEPS[which]
    student = copy_of(expert, run.device)
    trained = torch.nn.ParameterList(add_lora(student, RANK))
    optimizer = Optimizers(
        torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=run.device.type == "cuda")
    )
    average = Average(trained, 0.998)
    sigmas = torch.tensor(DISTILL.sigmas, device=run.device)
    timesteps = torch.tensor(DISTILL.timesteps, device=run.device)
    own = {first: entry, second: data.states[:, second].clone()}

    def batch() -> tuple[Tensor | None, ...]:
        index = torch.randint(len(data), (run.batch,), device=run.device)
        step = torch.randint(first, second + 1, (run.batch,), device=run.device)
        mine = torch.where((step == first)[:, None, None, None, None], own[first][index], own[second][index])
        theirs = data.states[index, step]
        start = torch.where((torch.rand(run.batch, device=run.device) < 0.5)[:, None, None, None, None], mine, theirs)
        given = None if data.images is None else condition(data.images[index].float())
        target = data.states[index, step + 1].float()
        with torch.no_grad():
            context = text(data.ids[index])
        return start.float(), target, timesteps[step], sigmas[step + 1] - sigmas[step], context, given

    loss_of = compiled_call(run, step_loss, student, batch, compiled)
    share = 0.5 if which == "high" else 1.0  # of the time that is left after compiling
    clock = Clock(max(share * (end - run.clock.total) / 60, 0.05), steps)
    report = clock.every(15)
    refresh = [0.35, 0.55, 0.75, 0.9]
    total, count = torch.zeros((), device=run.device), 0
    while not clock.done:
        if refresh and clock.progress > refresh[0]:
            refresh.pop(0)
            own[second] = own_states(run, student, text, data, own[first], first)
        with autocast(run.device):
            loss = loss_of(student, *batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step(learning_rate(clock.progress, warmup=0.02, flat=0.3))
        average.update(trained)
        total += loss.detach()
        count += 1
        clock.tick()
        if report.due():
            rate_now = clock.step * run.batch / clock.elapsed
            run.say(f"{which} step {clock.step} ({rate_now:.0f} samples/s) loss {total.item() / count:.5f}")
            total.zero_()
            count = 0
    average.copy_to(trained)
    run.keep(f"{which}_lora", lora_state_dict(student))
    run.say(f"{which}: {clock.step} steps of {run.batch} in {clock.elapsed:.0f} s")
    middle = own_states(run, student, text, data, own[first], first)
    return student, own_states(run, student, text, data, middle, second)


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
    rate: float,
    pool: int,
    guidance: tuple[float, float],
    limit: int,
) -> None:
    run = Run(task, runs, out, batch, seed, pool)
    text = load_text(runs / task, run.device)
    experts: Experts = {which: load_dit(run.folder / f"{which}.safetensors", run.device) for which in STEPS}
    result = {"base": run.test(text, experts, guidance=guidance)}
    run.say("base, 20 steps: " + describe(result["base"]))
    left = max(minutes - run.clock.total / 60, 0.1)
    data = teach(run, text, experts, guidance, TEACHER_PART * left * 60, limit)
    students: Experts = {}
    entry = data.states[:, 0]
    for which in STEPS:
        students[which], entry = fit(run, which, experts[which], text, data, entry, 60 * minutes, steps, rate, compiled)
        mixed = experts | students
        latents = sample_distilled(mixed, run.noise, text(run.prompts), run.images if task == "i2v" else None)
        result[f"4 steps, LoRA {'+'.join(students)}"] = judge(
            run.vae, latents, run.clips, run.unseen, run.frames if task == "i2v" else None
        )
        run.say(f"4 steps, LoRA {'+'.join(students)}: " + describe(result[f"4 steps, LoRA {'+'.join(students)}"]))
    path = run.folder / f"{task}_distill.json"
    path.write_text(json.dumps(result, indent=1))
    run.hand_out(path)
    run.hand_out(run.folder / f"{task}.log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=("t2v", "i2v"), required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--steps", type=int, help="of each LoRA, instead of minutes")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pool", type=int, default=16_384)
    parser.add_argument("--limit", type=int, default=100_000, help="trajectories at most")
    parser.add_argument("--runs", type=Path, default=Path("training/runs"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--guidance", type=float, nargs=2, help="high and low; default as the real model")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    train(
        args.task,
        args.runs,
        args.out,
        args.minutes,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        compiled=not args.no_compile,
        rate=args.rate,
        pool=args.pool,
        guidance=tuple(args.guidance) if args.guidance else GUIDANCE[args.task],
        limit=args.limit,
    )


if __name__ == "__main__":
    main()
