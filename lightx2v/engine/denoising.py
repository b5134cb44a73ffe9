"""Denoising: the steps of one video from noise to latents. It knows the step it has reached, so it can resume."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ..config.request import Expert, Request
from ..models.block import TextStates
from ..parallel.shared_cancel import SharedCancel
from ..progress import Meter
from ..sampling import SolverState, denoise, guided, initial_noise, solver_for
from .engine import LoadedEngine


class Denoising:
    """`finish` takes the remaining steps. After an error it can be called again and repeats only the failed step.
    `on_step` is called after each.

    `contexts` are the text encoder's states (L, D) of the prompt and, with guidance, of the negative prompt;
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
    ) -> None:
        self.engine, self.request, self.contexts, self.condition = engine, request, contexts, condition
        self.meter, self.cancel, self.on_step = meter, cancel, on_step
        # Several processes stop only between steps, where they can agree on it.
        self.cancel_within_step = engine.mesh.group.local_cancel(cancel)
        self.text_states: dict[int, list[TextStates]] = {}
        """The prompts' keys and values in one phase, which its expert, LoRAs and guidance decide."""
        self.solver = solver_for(request)
        self.schedule = self.solver.schedule
        channels, frames, height, width = request.latent_shape
        if condition is not None:  # an input image decides the size
            height, width = condition.shape[-2:]
        noise = initial_noise((channels, frames, height, width), request.seed)
        self.step, self.latents = 0, noise.to(engine.precision.device)
        self.solver_state = self.solver.state()

    def go_on_from(self, step: int, latents: Tensor, solver_state: SolverState) -> None:
        """Take the place of a run of the same request that has done `step` steps."""
        self.step, self.latents, self.solver_state = step, latents, solver_state

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
        schedule, mesh = self.schedule, self.engine.mesh
        phase, number, branches = schedule.phase(step), schedule.numbers[step], schedule.forwards[step]
        next_expert = schedule.experts[step + 1] if step + 1 < schedule.steps else None
        with self.engine.placement.expert(expert, next_expert, number) as dit:
            dit.split = mesh.token_split(branches)
            if number not in self.text_states:
                self.text_states.clear()  # the other phase's keys and values are not needed again
                local = mesh.local_branches(list(self.contexts[:branches]))
                self.text_states[number] = [dit.encode_text(context) for context in local]
            velocities = dit(latents, timestep, self.text_states[number], self.condition, self.cancel_within_step)
        return guided(mesh.gather_branches(velocities, branches), phase.scale)

    def after_step(self, step: int, latents: Tensor, clean: Callable[[], Tensor]) -> None:
        self.step, self.latents, self.solver_state = step + 1, latents, self.solver.state()
        self.meter.emit(
            "denoise",
            step + 1,
            self.schedule.steps,
            self.schedule.experts[step],
            preview=lambda: self.engine.preview(clean()),
        )
        self.on_step()
