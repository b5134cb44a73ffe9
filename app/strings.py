"""Strings: every text on the page in English and Chinese. `Words(language)("key", name=value)` returns one."""

from __future__ import annotations

import re

_TABLE: dict[str, tuple[str, str]] = {
    # the page
    "title": ("LightX2V Studio", "LightX2V Studio"),
    "tab_create": ("Create", "生成"),
    "tab_compare": ("Compare", "对比"),
    "language": ("Language", "语言"),
    "theme": ("Light or dark", "浅色或深色"),
    "public": ("Public: anyone with the link can use this page", "公开：任何有链接的人都能使用"),
    "shared": ("Shared: others can sign in", "已共享：他人可登录使用"),
    "nothing_loaded": ("No model loaded", "尚未加载模型"),
    "loaded": ("{name} loaded", "已加载 {name}"),
    "memory_free": ("{free} of {total} free", "可用 {free} / {total}"),
    "ram_free": ("RAM {free} of {total} free", "内存可用 {free} / {total}"),
    "cores": ("{name}, {n} cores", "{name}，{n} 核"),
    "worker_dead": ("The engine has stopped. Restart the app.", "引擎已停止，请重启应用。"),
    # inputs
    "mode_t2v": ("Text to video", "文生视频"),
    "mode_i2v": ("Image to video", "图生视频"),
    "mode": ("Make a video from", "生成方式"),
    "image": ("First frame", "首帧图片"),
    "last_frame": ("Last frame (optional)", "尾帧图片（可选）"),
    "image_hint": ("Drop an image here, or click to choose one", "将图片拖到此处，或点击选择"),
    "prompt": ("Prompt", "提示词"),
    "prompt_hint": (
        "Describe the scene, the motion and the camera.  Press Ctrl+Enter to generate.",
        "描述画面、动作和镜头。按 Ctrl+Enter 生成。",
    ),
    "examples": ("Examples", "示例"),
    "preset": ("Preset", "预设"),
    "offload": ("Offload", "卸载"),
    "offload_auto": ("auto", "自动"),
    "offload_on": ("on", "开"),
    "offload_off": ("off", "关"),
    "size": ("Size", "尺寸"),
    "shape": ("Shape", "画幅"),
    "shape_match": ("as image", "同图片"),
    "seconds": ("Length", "时长"),
    "generate": ("Generate", "生成视频"),
    "generate_n": ("Generate {n} videos", "生成 {n} 个视频"),
    "save_edit": ("Save to the queue", "保存到队列"),
    "advanced": ("Advanced", "高级设置"),
    "files": ("Model files", "模型文件"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("--seed · -1: random each time", "--seed · -1：每次随机"),
    "videos": ("Videos", "视频数量"),
    "videos_info": ("each with its own seed", "每个用不同种子"),
    "per_line": ("One video per line of the prompt", "提示词每行生成一个视频"),
    "negative_prompt": ("Negative prompt", "负向提示词"),
    "negative_info": (
        "Leave empty for the model's default. Ignored while guidance is off.",
        "留空则用模型默认值；关闭引导时不生效。",
    ),
    "steps": ("Steps", "步数"),
    "shift": ("Shift", "偏移"),
    "guidance_high": ("Guidance, high noise", "引导强度（高噪声）"),
    "guidance_low": ("Guidance, low noise", "引导强度（低噪声）"),
    "guidance": ("Guidance", "引导"),
    "enable_cfg": ("Guidance (doubles the work)", "启用引导（计算量翻倍）"),
    "boundary": ("Expert switch (noise level)", "专家切换点（噪声水平）"),
    "denoising_step_list": ("Denoising steps", "去噪时间步"),
    "boundary_step_index": ("Low-noise expert from step", "低噪声专家起始步"),
    "height": ("Height", "高"),
    "width": ("Width", "宽"),
    "frames": ("Frames", "帧数"),
    "fps": ("Frames per second", "帧率"),
    "sampler": ("Sampler", "采样器"),
    "attention": ("Attention", "注意力后端"),
    "loras": ("LoRAs", "LoRA"),
    "lora_high": ("High-noise file or Hub name", "高噪声文件或 Hub 名称"),
    "lora_low": ("Low-noise file or Hub name", "低噪声文件或 Hub 名称"),
    "strength_high": ("Strength, high", "强度（高）"),
    "strength_low": ("Strength, low", "强度（低）"),
    "add_lora": ("Add a LoRA", "添加 LoRA"),
    "remove_lora": ("Remove", "移除"),
    "restore_file": ("Restore from a video …", "从视频恢复…"),
    # crop preview
    "crop_sizes": ("{from_size} → {to_size}", "{from_size} → {to_size}"),
    "crop_whole": ("The model sees the whole image.", "模型会看到整张图片。"),
    "crop_part": ("The model sees the bright part.", "模型只看到明亮的部分。"),
    "crop_none": ("Shows the part of the image that the model sees.", "这里显示模型将看到的部分。"),
    # cost line
    "cost_time": ("about {time}", "约 {time}"),
    "cost_assumed": ("about {time} (rough estimate until the first run)", "约 {time}（首次运行前为粗略估计）"),
    "cost_load": ("+ loading", "+ 加载"),
    "cost_image": ("+ encoding the image", "+ 编码图片"),
    "cost_days": ("days on this machine", "本机需要数天"),
    "days": ("days", "数天"),
    "cost_unknown": ("time estimate after the first run", "首次运行后可预估时间"),
    "cost_fits": ("{need} of {free}", "需 {need} / 可用 {free}"),
    "cost_tight": ("{need} of {free}: tight", "需 {need} / 可用 {free}：紧张"),
    "cost_over": ("needs {need}, only {free} free: turn offload on", "需 {need}，仅 {free} 可用：请开启卸载"),
    "cost_download": ("{size} to download", "需下载 {size}"),
    "cost_ready": ("nothing to download", "无需下载"),
    "demo_world": (
        "The demo model only knows balls, boxes, triangles, stars, hearts and rings in eight colours that roll, rise, "
        "fall, grow, shrink, spin or bounce on grass, sand, snow or sea.",
        "演示模型只认识草地、沙滩、雪地和海面上八种颜色的球、方块、三角形、星星、爱心和圆环，"
        "以及滚动、上升、下落、变大、变小、旋转和弹跳。",
    ),
    "demo_unknown": ("The demo model does not know: {words}", "演示模型不认识：{words}"),
    "missing": ("files missing", "缺少文件"),
    "ready": ("ready", "就绪"),
    # stage and status
    "idle_title": ("Your video appears here", "视频将在这里显示"),
    "idle_text": ("Describe what you want to see, then press Generate.", "描述想看到的画面，然后点击“生成视频”。"),
    "idle_hint": ("Ready.", "就绪。"),
    "sample": ("sample", "示例"),
    "sample_alt": ("A sample video", "示例视频"),
    "dropped_video": ("The video you dropped", "拖入的视频"),
    "video_of": ("Video: {prompt}", "视频：{prompt}"),
    "preview_step": ("preview · step {step} of {total}", "预览 · 第 {step}/{total} 步"),
    "preview_alt": ("Preview of the unfinished video", "未完成视频的预览"),
    "progress": ("Progress", "运行进度"),
    "phase_download": ("download", "下载"),
    "phase_load": ("load", "加载"),
    "phase_text": ("text", "文本"),
    "phase_image": ("image", "图像"),
    "phase_denoise": ("denoise", "去噪"),
    "phase_high": ("high noise", "高噪声"),
    "phase_low": ("low noise", "低噪声"),
    "phase_decode": ("decode", "解码"),
    "phase_write": ("write", "写入"),
    "doing_download": ("Downloading", "下载中"),
    "doing_load": ("Loading the model", "加载模型"),
    "doing_text": ("Encoding the prompt", "编码提示词"),
    "doing_image": ("Encoding the image", "编码图片"),
    "doing_denoise": ("Denoising", "去噪"),
    "doing_decode": ("Decoding", "解码"),
    "doing_write": ("Writing the file", "写入文件"),
    "step_of": ("Step {step} of {total}", "第 {step}/{total} 步"),
    "part_of": ("{step} of {total}", "{step}/{total}"),
    "expert_high": ("high-noise expert", "高噪声专家"),
    "expert_low": ("low-noise expert", "低噪声专家"),
    "a_step": ("{time} a step", "每步 {time}"),
    "left": ("{time} left", "剩余 {time}"),
    "estimating": ("estimating", "估算中"),
    "starting": ("Starting", "准备中"),
    "stopping": ("Stopping", "正在停止"),
    "queued_behind": ("Waiting: number {n} in the queue", "排队中，第 {n} 位"),
    "stop": ("Stop", "停止"),
    "finished_in": ("Done in {time}", "完成，用时 {time}"),
    "state_queued": ("waiting", "排队中"),
    "state_running": ("running", "运行中"),
    "state_succeeded": ("done", "已完成"),
    "state_failed": ("failed", "失败"),
    "state_cancelled": ("stopped", "已停止"),
    "state_interrupted": ("interrupted", "被中断"),
    "explain_failed": ("The run failed.", "运行失败。"),
    "explain_cancelled": ("You stopped this run.", "已停止本次运行。"),
    "explain_interrupted": ("The app was closed during this run.", "运行期间应用被关闭。"),
    "retry": ("Try again", "重试"),
    "retry_offload": ("Try with offload on", "开启卸载后重试"),
    "retry_smaller": ("Try at {size}", "以 {size} 重试"),
    "retry_shorter": ("Try with {n} frames", "以 {n} 帧重试"),
    # report
    "last_run": ("Report", "运行报告"),
    "earlier_run": ("Report of an earlier run", "较早一次的运行报告"),
    "total": ("total", "总时间"),
    "a_step_short": ("a step", "每步"),
    "peak_vram": ("peak VRAM", "峰值显存"),
    "peak_ram": ("peak RAM", "峰值内存"),
    "predicted": ("predicted", "预测"),
    "file": ("file", "文件"),
    "n_frames": ("{n} frames", "{n} 帧"),
    "again_new_seed": ("Again with a new seed", "换种子再来"),
    "same_seed": ("Use this seed", "使用此种子"),
    "continue_last": ("Continue from the last frame", "从尾帧继续"),
    "download": ("Download", "下载"),
    "details": ("Details", "详情"),
    "settings_as": ("Settings as CLI · Python · curl · JSON", "导出设置：CLI · Python · curl · JSON"),
    "copy": ("Copy", "复制"),
    "copy_what": ("Copy {what}", "复制 {what}"),
    "stage": ("stage", "阶段"),
    "time": ("time", "用时"),
    "allocated": ("VRAM allocated", "显存已分配"),
    "reserved": ("VRAM reserved", "显存已保留"),
    "each_expert": ("{expert}, steps", "{expert}，步"),
    "device": ("device", "设备"),
    "memory": ("memory", "内存方案"),
    "prompt_tokens": ("prompt tokens", "提示词 token"),
    "lora_match": ("{name}: {matched} of {total} matched", "{name}：匹配 {matched}/{total}"),
    "off": ("off", "关"),
    "run": ("run", "编号"),
    # history and queue
    "history": ("History", "历史"),
    "drop_hint": ("drop a video made here on the page to restore its settings", "将生成的视频拖到页面即可恢复设置"),
    "history_empty": ("Your runs appear here and stay after a restart.", "生成记录会保存在这里，重启后仍在。"),
    "restore_run": ("Show this run and its settings: {prompt}", "显示此次运行及其设置：{prompt}"),
    "delete_run": ("Delete: {prompt}", "删除：{prompt}"),
    "compare_run": ("Compare: {prompt}", "加入对比：{prompt}"),
    "queue": ("Queue", "队列"),
    "n_waiting": ("{n} waiting", "{n} 个排队中"),
    "move_up": ("Earlier: {prompt}", "提前：{prompt}"),
    "move_down": ("Later: {prompt}", "推后：{prompt}"),
    "edit_run": ("Edit: {prompt}", "编辑：{prompt}"),
    "cancel_run": ("Cancel: {prompt}", "取消：{prompt}"),
    # compare
    "compare": ("Compare", "对比"),
    "compare_empty": (
        "Choose two finished runs with the compare buttons in the history.",
        "在历史中用对比按钮选择两个已完成的视频。",
    ),
    "compare_one": ("Choose a second run in the history.", "已选一个，请在历史中再选一个。"),
    "play_both": ("Play or pause both", "同时播放或暂停"),
    "seek_both": ("Position in both videos", "同步进度"),
    "setting": ("setting", "设置"),
    "same_settings": ("All settings are the same.", "所有设置都相同。"),
    "swap": ("Swap", "交换"),
    "clear": ("Clear", "清除"),
    "benchmark": ("Measured on this machine", "本机实测"),
    "benchmark_hint": ("medians of the finished runs, without loading", "已完成运行的中位数，不含加载"),
    "benchmark_empty": ("Finished runs appear in this table.", "完成的运行会显示在此表中。"),
    "runs": ("runs", "次数"),
    # files
    "files_state": ("{have} of {all} present · {size}", "已有 {have}/{all} · {size}"),
    "have": ("present", "已有"),
    "lacks": ("missing", "缺少"),
    "part_high": ("High-noise expert", "高噪声专家"),
    "part_low": ("Low-noise expert", "低噪声专家"),
    "part_text": ("Text encoder", "文本编码器"),
    "part_tokenizer": ("Tokenizer", "分词器"),
    "part_vae": ("VAE", "VAE"),
    "part_lora": ("LoRA", "LoRA"),
    "part_config": ("Architecture", "模型结构"),
    "part_other": ("File", "文件"),
    "disk_free": ("{size} free on the disk", "磁盘剩余 {size}"),
    "download_speed": ("{done} of {all} · {speed}/s · {left}", "{done} / {all} · {speed}/s · {left}"),
    "cancel": ("Cancel", "取消"),
    # variants of presets
    "variant_base": ("Base", "原始模型"),
    "variant_distill_lora": ("4-step LoRA", "4 步 LoRA"),
    "variant_distill_merged": ("4-step merged", "4 步合并"),
    "variant_distill_fp8": ("4-step FP8", "4 步 FP8"),
    "about_base": ("many steps with guidance: the reference", "多步加引导，作为基准"),
    "about_distill_lora": ("distilled; accepts your own LoRAs", "蒸馏，可叠加自己的 LoRA"),
    "about_distill_merged": ("distilled; one file per expert", "蒸馏，每个专家一个文件"),
    "about_distill_fp8": ("distilled; half the memory", "蒸馏，内存减半"),
    "demo": ("Demo", "演示"),
    # messages
    "prompt_empty": (
        "The prompt is empty. Describe the scene and the motion, or choose an example.",
        "提示词为空。请描述画面和动作，或选择一个示例。",
    ),
    "image_missing": (
        "Image to video needs a first frame. Choose an image, or switch to text to video.",
        "图生视频需要首帧图片。请选择一张图片，或切换到文生视频。",
    ),
    "not_yours": ("This run no longer exists.", "该运行已不存在。"),
    "zerogpu_reserves": ("reserves {n} s of your GPU quota", "将占用 {n} 秒 GPU 配额"),
}

LANGUAGES = {"en": "English", "zh": "中文"}
TABLES: dict[str, dict[str, str]] = {
    language: {key: texts[index] for key, texts in _TABLE.items()} for index, language in enumerate(LANGUAGES)
}


class Words:
    """The texts of one language."""

    def __init__(self, language: str) -> None:
        self.language = language if language in TABLES else "en"
        self._table = TABLES[self.language]

    def __call__(self, key: str, /, **values: object) -> str:
        text = self._table[key]
        return text.format(**values) if values else text

    def preset(self, name: str) -> str:
        """A short name for a preset: its variant in this language. An unknown preset keeps its own name."""
        shape = r"(demo_)?[ti]2v_(?:(base|distill_lora)|(?:distill_)?(merged|fp8))(_offload)?(_cfg_ulysses)?"
        if (match := re.fullmatch(shape, name)) is None:
            return name
        variant = self("variant_" + (match[2] or f"distill_{match[3]}"))
        return f"{self('demo')} · {variant}" if match[1] else variant


def preferred(header: str) -> str:
    """The best supported language for an Accept-Language header; English if it names none."""
    ranked: list[tuple[float, str]] = []
    for part in header.split(",")[:20]:
        name, _, quality = part.strip().partition(";q=")
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            weight = 0.0
        ranked.append((-weight, name.strip().lower().partition("-")[0]))
    return next((name for _, name in sorted(ranked, key=lambda item: item[0]) if name in TABLES), "en")
