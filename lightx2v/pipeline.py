"""The Python API: load a model, make videos.

    pipe = LightX2VPipeline(model_path="Wan-AI/Wan2.2-T2V-A14B", model_cls="wan2.2_moe", task="t2v")
    pipe.create_generator(config_json="presets/t2v_base.json")
    pipe.generate(prompt="A cat surfs.", seed=42, save_result_path="cat.mp4")

`create_generator` loads the model; `generate` only runs it. A run does not change the pipeline: the same request gives
the same latents whatever ran before.
"""

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import torch

from . import hub
from .catalog.choose import FileChoice, named_preset
from .cli.terminal import log_to_stderr
from .config.engine_config import EngineConfig
from .config.environment import Environment
from .config.lora_spec import LoraSpec
from .config.presets import resolve
from .config.request import Request, check, draw_seed
from .config.request_settings import SETTINGS, Guidance, RequestSettings
from .engine.engine import LoadedEngine, LoadSettings, load_engine, release_engine, with_other_loras
from .engine.memory_retry import within_memory
from .engine.result import Result
from .engine.run import Run
from .engine.saved_step import saved_step_for
from .errors import Busy, ConfigError, GroupFailed, LightX2VError
from .loading.rife_file import fetch_rife
from .media.video_writer import check_output_path, original_path
from .offload.kept_parts import KeptParts
from .parallel.process_group import CLOSE, EXIT
from .parallel.rendezvous import join
from .progress import CancelToken, Meter, OnProgress, free_memory
from .step_file import StepStore

log = logging.getLogger("lightx2v.pipeline")


class GeneratorSettings(RequestSettings, total=False):
    """Keywords of `create_generator`: a video's settings, LightX2V's Python names for some of them, and settings of
    the engine. Every other key of a preset file works too."""

    infer_steps: int
    num_frames: int
    guidance_scale: Guidance
    sample_shift: float
    attn_mode: str
    dtype: str
    cpu_offload: bool


class LightX2VPipeline:
    """One loaded model. As a context manager, it is freed at the end.

    `model_path` is a folder in the Wan2.2 layout or a Hub name; the two checkpoints are distilled or merged experts
    that replace those of the folder. Any thread may use the pipeline. It makes one video at a time: a call during a run
    raises Busy at once. In asyncio: `await asyncio.to_thread(pipe.generate, prompt=…, cancel=token)`.
    """

    def __init__(
        self,
        model_path: str | Path = "",
        model_cls: str = "wan2.2_moe",
        task: str = "t2v",
        *,
        models_dir: str | Path | None = None,
        high_noise_original_ckpt: str | Path | None = None,
        low_noise_original_ckpt: str | Path | None = None,
    ) -> None:
        self._overrides: dict[str, Any] = {"model_path": str(model_path), "model_cls": model_cls, "task": task}
        files = {
            "models_dir": models_dir,
            "high_noise_original_ckpt": high_noise_original_ckpt,
            "low_noise_original_ckpt": low_noise_original_ckpt,
        }
        self._overrides |= {name: str(path) for name, path in files.items() if path is not None}
        self._files = FileChoice()
        self._defaults: dict[str, Any] = {}
        self._loras: tuple[LoraSpec, ...] | None = None
        self._engine: LoadedEngine | None = None
        self._running = threading.Lock()

    @classmethod
    def from_files(
        cls,
        *,
        high: str | Path = "",
        low: str | Path = "",
        t5: str | Path = "",
        vae: str | Path = "",
        loras: Sequence[str] = (),
        model_dirs: Sequence[str | Path] = (),
    ) -> Self:
        """A pipeline of one's own files, each a path or the name of a found file. What is left out is found in
        `model_dirs` and in the other folders of models (`python -m lightx2v.find_models` lists them), or on the Hub.

        `loras` are written as "FILE:0.8" or "high=FILE:0.8". `create_generator()` then starts from the settings of a
        shipped preset for such a model, or from those of its `config_json`. Raises ConfigError and CheckpointError.
        """
        pipe = cls()
        dirs = tuple(map(str, model_dirs))
        pipe._files = FileChoice(str(high), str(low), str(t5), str(vae), tuple(loras), dirs)
        pipe._overrides = {}
        return pipe

    @classmethod
    def from_config(cls, config: EngineConfig, **settings: Unpack[LoadSettings]) -> Self:
        """Load a pipeline. Reports and files carry the name `preset`. The `prompts` of its first request may be encoded
        meanwhile. Of what the `release` of another pipeline has `kept`, equal parts are used, and the rest is freed."""
        pipe = cls(config.model_path, config.model_cls, config.task)
        pipe._engine = load_engine(config, **settings)
        return pipe

    # ---- settings before loading --------------------------------------------------------------------------------

    def enable_offload(
        self,
        cpu_offload: bool = True,
        *,
        offload_granularity: str = "block",
        text_encoder_offload: bool | str = "auto",
        image_encoder_offload: bool = False,
        vae_offload: bool | str = "auto",
        lazy_load: bool = False,
    ) -> None:
        """Keep weights in host memory, as whole experts ("model") or blocks ("block"), or on disk with `lazy_load`.

        "auto" follows `cpu_offload`. `image_encoder_offload` is LightX2V's and has no effect: Wan2.2-A14B has no image
        encoder. Call every enable_… before `create_generator`, which raises ConfigError for values that do not fit.
        """
        self._before_loading("enable_offload")
        self._overrides |= {
            "cpu_offload": cpu_offload,
            "offload_granularity": offload_granularity,
            "t5_cpu_offload": text_encoder_offload,
            "vae_cpu_offload": vae_offload,
            "lazy_load": lazy_load,
        }

    def enable_quantize(
        self,
        dit_quantized: bool = False,
        text_encoder_quantized: bool = False,
        *,
        high_noise_quantized_ckpt: str | None = None,
        low_noise_quantized_ckpt: str | None = None,
        text_encoder_quantized_ckpt: str | None = None,
        quant_scheme: str = "fp8-sgl",
        text_encoder_quant_scheme: str | None = None,
    ) -> None:
        """Load quantised experts or a quantised text encoder, from these files (paths or Hub names).

        `quant_scheme` is one of LightX2V's names: "fp8…" (e4m3) or "int8…", with a scale per row or tensor, as in the
        files, or "gguf-…". The part after the dash names a kernel of LightX2V; this engine takes the best kernel that
        runs. For GGUF it names a mix of formats; the file decides.
        """
        self._before_loading("enable_quantize")
        self._overrides |= {
            "dit_quantized": dit_quantized,
            "dit_quant_scheme": quant_scheme if dit_quantized else None,
            "high_noise_quantized_ckpt": high_noise_quantized_ckpt,
            "low_noise_quantized_ckpt": low_noise_quantized_ckpt,
            "t5_quantized": text_encoder_quantized,
            "t5_quant_scheme": (text_encoder_quant_scheme or quant_scheme) if text_encoder_quantized else None,
            "t5_quantized_ckpt": text_encoder_quantized_ckpt,
        }

    def enable_lora(
        self,
        lora_configs: Sequence[dict[str, Any] | LoraSpec],
        *,
        lora_dynamic_apply: bool = False,
        lora_allow_partial: bool = False,
    ) -> None:
        """Add LoRAs per expert: {"name": "high_noise_model" or "low_noise_model", "path": …, "strength": 1.0}.

        A file without a name goes to the expert in its file name, and its partner beside it to the other expert.
        Loading merges the LoRAs into the weights. With `lora_dynamic_apply` they stay separate, which slows each step a
        little and makes `switch_lora` fast. `create_generator` raises LoraError for a file that does not fit; with
        `lora_allow_partial` the fitting layers are used, and the report counts them.
        """
        self._before_loading("enable_lora")
        self._overrides |= {
            "lora_configs": list(lora_configs),
            "lora_dynamic_apply": lora_dynamic_apply,
            "lora_allow_partial": lora_allow_partial,
        }

    def enable_parallel(self, cfg_p_size: int = 1, seq_p_size: int = 1, seq_p_attn_type: str = "ulysses") -> None:
        """Split each video over `cfg_p_size` x `seq_p_size` processes, which torchrun must have started.

        `cfg_p_size` 2 gives each guidance branch its own half of the processes; `seq_p_size` splits the sequence.
        Without this call the layout follows from the number of processes.
        """
        self._before_loading("enable_parallel")
        self._overrides["parallel"] = {
            "cfg_p_size": cfg_p_size,
            "seq_p_size": seq_p_size,
            "seq_p_attn_type": seq_p_attn_type,
        }

    def create_generator(self, config_json: str | Path | None = None, **settings: Unpack[GeneratorSettings]) -> None:
        """Resolve the configuration and load the model. `settings` override those of the JSON.

        `config_json` is a file in LightX2V's format, or the name of a preset or of a found model. Sizes are in pixels
        (multiples of 16), `num_frames` is 4n + 1, `guidance_scale` one number or (high-noise expert, low-noise expert).
        `generate` starts from these settings; None leaves one to the JSON. Raises ConfigError, BadRequest,
        CheckpointError (LoraError), DownloadError or OutOfMemory; no model stays loaded then.
        """
        self._before_loading("create_generator")
        overrides = self._overrides | {key: value for key, value in settings.items() if value is not None}
        environment, files = Environment.read(), self._files
        preset = {} if config_json is None else named_preset(config_json, files.model_dirs, environment)
        if files.names_experts:
            preset = files.settings(preset)
        overrides |= files.overrides(preset)
        if environment.profiling:
            log_to_stderr(prefix=environment.log_prefix)
        resolved = resolve(preset, overrides, environment=environment)
        self._defaults = dict(resolved.request)
        self._engine = load_engine(resolved.engine, preset=resolved.preset.name)

    def _before_loading(self, name: str) -> None:
        if self._engine is not None:
            raise ConfigError(
                f"{name} must come before the model is loaded. Call close() first, or make a new pipeline."
            )

    # ---- one video ----------------------------------------------------------------------------------------------

    def generate(
        self,
        *,
        prompt: str,
        negative_prompt: str = "",
        image_path: str | Path | None = None,
        last_frame_path: str | Path | None = None,
        save_result_path: str | Path | None = None,
        return_result_tensor: bool = False,
        return_latents: bool = False,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        **settings: Unpack[RequestSettings],
    ) -> Result:
        """Make one video. Settings that are missing or None are `create_generator`'s. An existing file is replaced.

        `image_path` and `last_frame_path` are JPEG, PNG, WebP or AVIF files (HEIC with pillow-heif); sizes are in
        pixels, `fps` in frames a second, `guidance` is one number or (high-noise expert, low-noise expert).
        `save_result_path` is an mp4 in an existing folder; None writes no file. The Result has `frames` (uint8, T H W
        C) with `return_result_tensor`, `latents` (float32, C T h w, before the VAE) with `return_latents`, the seed (-1
        draws one), seconds per stage and peaks in bytes. `on_progress` runs in this thread; `cancel` is checked between
        blocks and tiles. Raises BadRequest, LoraError, OutputError, OutOfMemory, NumericsError, Cancelled, or Busy
        during another run; the next run is not affected.
        """
        check.known_keys(settings, [*SETTINGS], "generate")
        images = {"image_path": image_path, "last_frame_path": last_frame_path}
        given: dict[str, Any] = {name: str(path) for name, path in images.items() if path is not None}
        given |= {name: value for name, value in settings.items() if value is not None}
        request = Request(prompt=prompt, negative_prompt=negative_prompt, **{**self._defaults, **given})
        return self.run(
            request,
            save_result_path=save_result_path,
            on_progress=on_progress,
            cancel=cancel,
            force=True,
            return_frames=return_result_tensor,
            return_latents=return_latents,
        )

    def run(
        self,
        request: Request,
        *,
        save_result_path: str | Path | None = None,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        metadata: bool = True,
        force: bool = False,
        return_frames: bool = False,
        return_latents: bool = False,
        steps: StepStore | None = None,
    ) -> Result:
        """Run one complete request, as `generate` does. `metadata` writes the settings into the file; `force` replaces
        an existing file. With `steps`, the run goes on from the step that is saved there, if it is of the same request
        and engine, and saves its own there, also when `cancel` is suspended."""
        engine, loras = self._loaded(), self._loras_of(request)
        saved, warning = None, ""
        with self._exclusive("Wait for it, or load a second pipeline."):

            def checked() -> Request:
                nonlocal saved, warning
                engine.config.check_request(request)
                if save_result_path is not None:
                    kept = [original_path(save_result_path)] if request.keeps_original else []
                    for target in (save_result_path, *kept):
                        check_output_path(target, force=force)
                if request.interpolator == "rife":
                    fetch_rife(engine.config, on_progress=on_progress, cancel=cancel)
                if steps is not None:
                    saved, warning = saved_step_for(steps, engine, request, loras)
                drawn = draw_seed() if saved is None else saved.seed
                return replace(request, seed=drawn) if request.seed == -1 else request

            group = engine.mesh.group
            agreed = group.run_on_rank0("run", checked, Request.to_json, Request.from_json)
            # Rank 0 alone has the frames and writes.
            path, frames = (save_result_path, return_frames) if group.is_rank0 else (None, False)
            with group.collective():
                run = Run(engine, agreed, on_progress, cancel, steps if group.is_rank0 else None, saved)
                saved = None  # the run frees it
                if warning:
                    run.warn(warning)
                run.use_loras(self._loras_of(agreed))
                with torch.inference_mode():
                    return within_memory(lambda: run.video(path, metadata, force, frames, return_latents), run.size)

    def switch_lora(self, lora_configs: Sequence[dict[str, Any] | LoraSpec]) -> None:
        """Exchange the LoRAs of both experts, now and for every request without LoRAs of its own; [] removes them.

        The base model stays loaded. After a LoraError or a DownloadError the previous LoRAs stay. Busy during a run.
        """
        engine = self._loaded()
        config = replace(engine.config, lora_configs=lora_configs) if lora_configs else engine.config
        with self._exclusive("Wait for it before you exchange its LoRAs."):

            def download() -> tuple[LoraSpec, ...]:
                hub.ensure(config, meter=Meter())
                return config.lora_configs if lora_configs else ()

            group = engine.mesh.group
            loras = group.run_on_rank0(
                "lora",
                download,
                lambda specs: [spec.to_json() for spec in specs],
                lambda content: tuple(LoraSpec.from_json(spec) for spec in content),
            )
            with group.collective():
                within_memory(lambda: engine.placement.use_loras(loras), "while exchanging LoRAs")
            self._loras = loras

    def exchange(
        self,
        config: EngineConfig,
        *,
        preset: str = "",
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
    ) -> bool:
        """Become a pipeline of `config` if only its LoRAs differ; False, with nothing changed, if more does."""
        with self._exclusive("Wait for it before you exchange its model."):
            engine = with_other_loras(self._loaded(), config, preset, on_progress, cancel)
            if engine is not None:
                self._engine, self._loras = engine, None
        return engine is not None

    @classmethod
    def follow(cls) -> bool:
        """Run the worker loop on ranks > 0 and return True when rank 0 exits; return False at once on rank 0.

        A server or the page calls this at its start, and exits if it returns True. The loop loads and runs whatever
        rank 0 does. Rank 0 reports the errors that all processes share; any other error ends all of them.
        """
        environment = Environment.read()
        if not environment.distributed:
            return False
        group, pipe = join(environment), None
        if group.is_rank0:
            return False
        for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 ends its run, then every process
            signal.signal(number, signal.SIG_IGN)
        while True:
            what, content = group.next_command()
            try:
                if what == EXIT:
                    return True
                if what == "load":
                    if pipe is not None:
                        pipe.close()
                        pipe = None
                    pipe = cls.from_config(EngineConfig.from_json(content["config"]), preset=content["preset"])
                elif what == "run" and pipe is not None:
                    pipe.run(Request.from_json(content))
                elif what == "lora" and pipe is not None:
                    pipe.switch_lora([])
                else:
                    group.finish_command()
                    if what == CLOSE and pipe is not None:
                        pipe.close()
                        pipe = None
            except GroupFailed:
                raise
            except LightX2VError as error:
                log.debug("%s", error)
            except BaseException as error:
                group.report_failure(error)
                raise

    def _loras_of(self, request: Request) -> tuple[LoraSpec, ...]:
        if request.loras is not None:
            return request.loras
        return self._loaded().config.lora_configs if self._loras is None else self._loras

    def close(self) -> None:
        """Free the model, on the device and on the host. The pipeline can then load another one. Busy during a run."""
        self.release().close()
        free_memory()

    def release(self) -> KeptParts:
        """Close the pipeline, but leave in memory what another one may use. Its `close` frees that."""
        with self._exclusive("Cancel it or wait for it before you close the pipeline."):
            engine, self._engine, self._loras = self._engine, None, None
            return KeptParts() if engine is None else release_engine(engine)

    @contextmanager
    def _exclusive(self, advice: str) -> Iterator[None]:
        if not self._running.acquire(blocking=False):
            raise Busy(f"This pipeline is making a video. {advice}")
        try:
            yield
        finally:
            self._running.release()

    def _loaded(self) -> LoadedEngine:
        if self._engine is None:
            raise ConfigError("No model is loaded. Call create_generator() first.")
        return self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
