"""The Python API: load a model, make videos.

    pipe = LightX2VPipeline(model_path="Wan-AI/Wan2.2-T2V-A14B", model_cls="wan2.2_moe", task="t2v")
    pipe.create_generator(config_json="presets/t2v_base.json")
    pipe.generate(prompt="A cat surfs.", seed=42, save_result_path="cat.mp4")

`create_generator` loads; `generate` runs and loads nothing. A run leaves no trace in the pipeline: the same request
gives the same latents whatever ran before.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import torch

from . import hub
from .cli.terminal import log_to_stderr
from .config.engine_config import EngineConfig
from .config.environment import Environment
from .config.presets import resolve
from .config.request import LoraSpec, Request, check
from .config.request_settings import SETTINGS, Guidance, RequestSettings
from .cost.machine import free_memory
from .engine.engine import LoadedEngine, load_engine
from .engine.memory_retry import within_memory
from .engine.result import Result
from .engine.run import Run
from .errors import Busy, ConfigError, GroupFailed, LightX2VError
from .media.video_writer import check_output_path
from .parallel.process_group import CLOSE, EXIT
from .parallel.rendezvous import join
from .progress import CancelToken, Meter, OnProgress
from .sampling import draw_seed

log = logging.getLogger("lightx2v.pipeline")


class GeneratorSettings(RequestSettings, total=False):
    """Keywords of `create_generator`: a video's settings, LightX2V's Python names for some of them, and the engine's.

    Every other key of a preset file works too.
    """

    infer_steps: int
    num_frames: int
    guidance_scale: Guidance
    sample_shift: float
    attn_mode: str
    dtype: str
    cpu_offload: bool


class LightX2VPipeline:
    """One loaded model; as a context manager it is freed at the end.

    `model_path` is a folder in the Wan2.2 layout or a Hub name; the two checkpoints are distilled or merged experts
    that replace those of the folder. Any thread may use it, but for one video at a time: whatever would disturb a run
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
        self._defaults: dict[str, Any] = {}
        self._loras: tuple[LoraSpec, ...] | None = None
        self._engine: LoadedEngine | None = None
        self._running = threading.Lock()

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        preset: str = "",
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
    ) -> Self:
        """A loaded pipeline. `preset` is the name that reports and files carry."""
        pipe = cls(config.model_path, config.model_cls, config.task)
        pipe._engine = load_engine(config, preset=preset, on_progress=on_progress, cancel=cancel)
        return pipe

    # ---- what to load -------------------------------------------------------------------------------------------

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
        """Keep weights in host memory: whole experts ("model") or block by block ("block"); with `lazy_load` on disk.

        "auto" follows `cpu_offload`. `image_encoder_offload` is LightX2V's and moves nothing: Wan2.2-A14B has no image
        encoder. Like every enable_…: before `create_generator`, which raises ConfigError for values that do not fit.
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
        """Load 8-bit experts or an 8-bit text encoder, from these files (paths or Hub names).

        `quant_scheme` is one of LightX2V's names: "fp8…" (e4m3) or "int8…", with a scale per row or tensor as the
        files have it. The part after the dash is a kernel of LightX2V's; here the best that runs is taken.
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
        """LoRAs per expert: {"name": "high_noise_model" or "low_noise_model", "path": …, "strength": 1.0}.

        Without a name, one half of a pair goes to the expert its file name says, and brings the other half beside it.
        They are added to the weights as these are loaded, or with `lora_dynamic_apply` kept beside them, which costs
        some time in each step and makes exchanging them quick. `create_generator` raises LoraError for a file that
        does not fit; with `lora_allow_partial` what fits of it is used, and the report says how much.
        """
        self._before_loading("enable_lora")
        self._overrides |= {
            "lora_configs": list(lora_configs),
            "lora_dynamic_apply": lora_dynamic_apply,
            "lora_allow_partial": lora_allow_partial,
        }

    def enable_parallel(self, cfg_p_size: int = 1, seq_p_size: int = 1, seq_p_attn_type: str = "ulysses") -> None:
        """Share each video among `cfg_p_size` x `seq_p_size` processes, which torchrun has to have started.

        `cfg_p_size` 2 gives each of the two guidance branches its own half, `seq_p_size` splits the sequence. Without
        this call a layout that fits the number of processes is chosen.
        """
        self._before_loading("enable_parallel")
        self._overrides["parallel"] = {
            "cfg_p_size": cfg_p_size,
            "seq_p_size": seq_p_size,
            "seq_p_attn_type": seq_p_attn_type,
        }

    def create_generator(self, config_json: str | Path | None = None, **settings: Unpack[GeneratorSettings]) -> None:
        """Resolve the configuration and load the model. `settings` override those of the JSON.

        `config_json` is a file in LightX2V's format or the name of a shipped preset. Sizes are in pixels (multiples of
        16), `num_frames` is 4n + 1, `guidance_scale` one number or (high-noise expert, low-noise expert). `generate`
        starts from these settings; None leaves one to the JSON. Raises ConfigError, BadRequest, CheckpointError
        (LoraError), DownloadError or OutOfMemory; no model stays loaded then.
        """
        self._before_loading("create_generator")
        overrides = self._overrides | {key: value for key, value in settings.items() if value is not None}
        preset = config_json if config_json is not None else {}
        environment = Environment.read()
        if environment.profiling:
            log_to_stderr(prefix=environment.log_prefix)
        resolved = resolve(preset, overrides, environment=environment)
        self._defaults = dict(resolved.request)
        self._engine = load_engine(resolved.engine, preset=resolved.preset.name)

    def _before_loading(self, name: str) -> None:
        if self._engine is not None:
            raise ConfigError(f"{name} comes before the model is loaded. Call close() first, or make a new pipeline.")

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

        `image_path` and `last_frame_path` are JPEG, PNG or WebP files; sizes are in pixels, `fps` in frames a second,
        `guidance` is one number or (high-noise expert, low-noise expert). `save_result_path` is an mp4 in an existing
        folder; None writes no file. The Result has `frames` (uint8, T H W C) with `return_result_tensor`, `latents`
        (float32, C T h w, before the VAE) with `return_latents`, the seed (-1 draws one), seconds per stage and peaks
        in bytes. `on_progress` runs in this thread; `cancel` is checked between blocks and tiles. Raises BadRequest,
        LoraError, OutputError, OutOfMemory, NumericsError, Cancelled, or Busy during another run; the next run is not
        affected.
        """
        check.known_keys(settings, [*SETTINGS], "generate")
        images = {"image_path": image_path, "last_frame_path": last_frame_path}
        given = {name: str(path) for name, path in images.items() if path is not None}
        given |= {name: value for name, value in settings.items() if value is not None}
        request = Request(prompt=prompt, negative_prompt=negative_prompt, **self._defaults | given)
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
    ) -> Result:
        """Runs one request as `generate` does, with nothing filled in. `metadata` writes the settings into the file;
        `force` replaces an existing one."""
        engine = self._engine
        if engine is None:
            raise ConfigError("No model is loaded. Call create_generator() first.")
        if not self._running.acquire(blocking=False):
            raise Busy("This pipeline is already making a video. Wait for it, or load a second pipeline.")
        try:

            def checked() -> Request:
                engine.config.check_request(request)
                if save_result_path is not None:
                    check_output_path(save_result_path, force=force)
                return replace(request, seed=draw_seed()) if request.seed == -1 else request

            def video(request: Request, path: str | Path | None, return_frames: bool) -> Result:
                run = Run(engine, request, on_progress, cancel)
                run.use_loras(self._loras_of(request))
                with torch.inference_mode():
                    return within_memory(
                        lambda: run.video(path, metadata, force, return_frames, return_latents), run.size
                    )

            group = engine.mesh.group
            agreed = group.run_on_rank0("run", checked, Request.to_json, Request.from_json)
            with group.collective():
                # Rank 0 alone has the frames and writes.
                return video(agreed, save_result_path if group.is_rank0 else None, return_frames and group.is_rank0)
        finally:
            self._running.release()

    def switch_lora(self, lora_configs: Sequence[dict[str, Any] | LoraSpec]) -> None:
        """Exchanges the LoRAs of both experts, now and for all requests that bring none of their own; [] is none.

        The base model is not loaded again. After a LoraError or a DownloadError the LoRAs are as they were. Busy while
        a video is made.
        """
        engine = self._engine
        if engine is None:
            raise ConfigError("No model is loaded. Call create_generator() first.")
        config = replace(engine.config, lora_configs=lora_configs) if lora_configs else engine.config
        if not self._running.acquire(blocking=False):
            raise Busy("This pipeline is making a video. Wait for it before you exchange its LoRAs.")
        try:

            def download() -> tuple[LoraSpec, ...]:
                hub.ensure(config, meter=Meter())
                return config.lora_configs if lora_configs else ()

            group = engine.mesh.group
            loras = group.run_on_rank0("lora", download, _loras_to_json, _loras_from_json)
            with group.collective():
                within_memory(lambda: engine.placement.use_loras(loras), "while exchanging LoRAs")
            self._loras = loras
        finally:
            self._running.release()

    @classmethod
    def follow(cls) -> bool:
        """A server or the page calls this as it starts; where it is true, the program is to end.

        On rank 0 of torchrun, and without torchrun, it is false at once. The other processes load and run here what
        rank 0 does, until rank 0 ends. Errors that all processes have are rank 0's to tell; any other one ends them.
        """
        environment = Environment.read()
        if not environment.distributed:
            return False
        group, pipe = join(environment), None
        if group.is_rank0:
            return False
        for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 heeds them: it ends its run, and then all
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
        assert self._engine is not None
        return self._engine.config.lora_configs if self._loras is None else self._loras

    def close(self) -> None:
        """Frees the model, on the device and on the host. The pipeline may then load another one. Busy during a run."""
        if not self._running.acquire(blocking=False):
            raise Busy("This pipeline is making a video. Cancel it or wait for it before you close the pipeline.")
        try:
            self._loras = None
            if self._engine is not None:
                self._engine.mesh.group.send_command(CLOSE)
                self._engine.placement.close()
                self._engine = None
                free_memory()
        finally:
            self._running.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _loras_to_json(loras: Sequence[LoraSpec]) -> list[dict[str, Any]]:
    return [lora.to_json() for lora in loras]


def _loras_from_json(content: list[dict[str, Any]]) -> tuple[LoraSpec, ...]:
    return tuple(LoraSpec.from_json(lora) for lora in content)
