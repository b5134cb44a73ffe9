"""Denoising: the steps of one video from noise to latents. It knows the step it has reached, so it can resume.

MagCache (config/magcache.py) says in advance which forwards are skipped. What the blocks added is kept in memory only
from a forward to those that reuse it, so a run can go on in another process after each step that none reuses.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from ..config.magcache import forwards_of
from ..config.phases import Expert
from ..config.request import Request
from ..models.block import Nag, TextStates
from ..models.dit import WanDiT
from ..parallel.shared_cancel import SharedCancel
from ..progress import Meter
from ..sampling import SolverState, denoise, guided, initial_noise, solver_for
from .engine import LoadedEngine

OnResidual = Callable[[int, int, Tensor], None]
"""(step, branch, what all blocks added (1, l, D))"""


class Denoising:
    """`finish` takes the remaining steps. After an error it can be called again and repeats only the failed step.
    `on_step` is called after each, `see` with what the blocks added in each forward.

    `contexts` are the text encoder's states (L, D) of the prompt and, with guidance or NAG, of the negative prompt;
    `condition` is (20, T, h, w) for image-to-video, else None.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        request: Request,
        contexts: Sequence[Tensor],
        condition: Tensor | None,
        meter: Meter,
        cancel: SharedCancel,
        on_step: Callable[[], None],
        see: OnResidual | None = None,
    ) -> None:
        self.engine, self.request, self.contexts, self.condition = engine, request, contexts, condition
        self.meter, self.cancel, self.on_step, self.see = meter, cancel, on_step, see
        # Several processes stop only between steps, where they can agree on it.
        self.cancel_within_step = engine.mesh.group.local_cancel(cancel)
        self.text_states: dict[int, dict[int, TextStates]] = {}
        """By branch, the prompts' keys and values in one phase, which its expert, LoRAs and guidance decide."""
        self.solver = solver_for(request)
        self.schedule = self.solver.schedule
        self.forwards = forwards_of(request)
        self.residuals: dict[int, Tensor] = {}
        """Branch -> what the blocks added, where a later forward reuses it."""
        channels, frames, height, width = request.latent_shape
        if condition is not None:  # an input image decides the size
            height, width = condition.shape[-2:]
        noise = initial_noise((channels, frames, height, width), request.seed)
        self.step, self.latents = 0, noise.to(engine.precision.device)
        self.solver_state = self.solver.state()
        self.resumable = self.step, self.latents, self.solver_state
        """The last of these three from which a run goes on without `residuals`."""

    def go_on_from(self, step: int, latents: Tensor, solver_state: SolverState) -> None:
        """Take the place of a run of the same request that has done `step` steps."""
        self.step, self.latents, self.solver_state = self.resumable = step, latents, solver_state

    def expert_order_warning(self) -> str:
        """Before the first step: a warning if the two experts seem to be exchanged, else ""."""
        return self.engine.expert_order.warning(
            self.engine.placement,
            self.latents,
            self.schedule.sigmas[0],
            self.schedule.timesteps[0],
            self.contexts[0],
            self.condition,
            self.schedule.first_numbers,
            self.cancel_within_step,
        )

    def finish(self) -> Tensor:
        """The latents (16, T, h, w) after the last step."""
        self.text_states.clear()
        self.solver.restore(self.solver_state, self.step)
        return denoise(
            self.solver,
            self.velocity,
            self.latents,
            start=self.step,
            on_step=self.after_step,
            cancel=self.cancel,
            backend=self.engine.self_attention.name,
        )

    def velocity(self, expert: Expert, latents: Tensor, timestep: float, step: int) -> Tensor:
        """The velocity at these latents, with guidance where the step's phase has it."""
        mesh, runs = self.engine.mesh, self.forwards.runs[step]
        local = mesh.local_branches([*range(len(runs))])
        computed = [branch for branch in local if runs[branch]]
        velocities: dict[int, Tensor] = {}
        with self._expert(step) as dit:
            dit.split = mesh.token_split(len(runs))
            dit.self_attention = self.engine.self_attention.in_step(step, self.schedule.steps)
            if computed:
                made = self._forward(dit, step, computed, latents, timestep, self.forwards.reused(step))
                velocities |= zip(computed, made, strict=True)
            elif self._runs_blocks(step):  # another process computes, and reads the blocks together with this one
                self._forward(dit, step, local, latents, timestep)
            if reused := [branch for branch in local if not runs[branch]]:
                kept = [self.residuals[branch] for branch in reused]
                velocities |= zip(reused, dit.without_blocks(latents, timestep, kept, self.condition), strict=True)
        gathered = mesh.gather_branches([velocities[branch] for branch in local], len(runs))
        return guided(gathered, self.schedule.phase(step).scale)

    def _forward(
        self,
        dit: WanDiT,
        step: int,
        branches: Sequence[int],
        latents: Tensor,
        timestep: float,
        reused: Sequence[int] = (),
    ) -> list[Tensor]:
        """One velocity per branch; keeps what the blocks added for those that are `reused`."""
        number = self.schedule.numbers[step]
        if number not in self.text_states:
            self.text_states.clear()  # the other phase's keys and values are not needed again
            local = self.engine.mesh.local_branches([*range(self.schedule.forwards[step])])
            self.text_states[number] = {branch: self._encode(dit, step, branch) for branch in local}
        states = [self.text_states[number][branch] for branch in branches]
        if self.see is None and not any(branch in reused for branch in branches):
            return dit(latents, timestep, states, self.condition, self.cancel_within_step)
        for branch in branches:
            self.residuals.pop(branch, None)
        residuals: list[Tensor] = []
        made = dit(latents, timestep, states, self.condition, self.cancel_within_step, residuals)
        if self.see is not None:
            for branch, residual_BLD in zip(branches, residuals, strict=True):
                self.see(step, branch, residual_BLD)
        self.residuals |= {b: r for b, r in zip(branches, residuals, strict=True) if b in reused}
        return made

    def _encode(self, dit: WanDiT, step: int, branch: int) -> TextStates:
        request = self.request
        if not request.nag or self.schedule.phase(step).guided:
            return dit.encode_text(self.contexts[branch])
        nag = Nag(request.nag_scale, request.nag_tau, request.nag_alpha)
        return dit.encode_text(self.contexts[branch], negative_LD=self.contexts[1], nag=nag)

    def _expert(self, step: int) -> AbstractContextManager[WanDiT]:
        """The expert of a step, and which comes next: of the next step, and of the next that runs blocks."""
        experts = self.schedule.experts
        later = range(step + 1, self.schedule.steps)
        return self.engine.placement.expert(
            experts[step],
            experts[step + 1] if later else None,
            self.schedule.numbers[step],
            blocks=self._runs_blocks(step),
            then_blocks=next((experts[i] for i in later if self._runs_blocks(i)), None),
        )

    def _runs_blocks(self, step: int) -> bool:
        """Whether this process runs the blocks in this step. Processes that read weights together all do or none."""
        runs = self.forwards.runs[step]
        return any(runs if self.engine.placement.reads_together else self.engine.mesh.local_branches([*runs]))

    def after_step(self, step: int, latents: Tensor, clean: Callable[[], Tensor]) -> None:
        self.step, self.latents, self.solver_state = step + 1, latents, self.solver.state()
        reused = self.forwards.reused(step)
        self.residuals = {branch: residual for branch, residual in self.residuals.items() if branch in reused}
        if not reused:
            self.resumable = self.step, self.latents, self.solver_state
        before, _ = self.forwards.work(self.meter.resumed_after)
        done, total = self.forwards.work(self.step)
        self.meter.emit(
            "denoise",
            step + 1,
            self.schedule.steps,
            self.schedule.experts[step],
            work=(done - before, total - before),
            preview=lambda: self.engine.preview(clean()),
        )
        self.on_step()
