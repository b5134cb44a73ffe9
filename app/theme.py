"""The page's theme: colours, fonts, and the HTML head with style sheet and script."""

import gradio as gr

from lightx2v.config.model_paths import PROJECT

ASSETS = PROJECT / "assets"


def head() -> str:
    """Style sheet and script, inline: both must load before gradio mounts the first component. gradio's parameter for a
    style sheet rewrites its selectors, and breaks those with a comma in brackets."""
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("studio.css", "studio.js"))
    return f"<style>{style}</style><script>{script}</script>"


def theme() -> gr.themes.Base:
    """System fonts and one accent colour; the style sheet defines the rest."""
    fonts = ["Inter", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans CJK SC", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    base = gr.themes.Base(primary_hue="indigo", neutral_hue="zinc", font=fonts, font_mono=mono)
    paint: dict[str, str] = {}
    for (light, dark), names in _COLOURS.items():
        for name in names:
            paint |= {name: light, f"{name}_dark": dark}
    return base.set(**paint, **_MEASURES)


_COLOURS = {
    ("#f6f7f9", "#101216"): ("body_background_fill",),
    ("#16181d", "#eceef2"): ("body_text_color", "block_title_text_color", "button_secondary_text_color"),
    ("#5b6270", "#a0a7b4"): ("body_text_color_subdued", "block_info_text_color"),
    ("#ffffff", "#191c22"): (
        "background_fill_primary", "block_label_background_fill", "button_secondary_background_fill",
    ),
    ("#f3f4f7", "#121419"): ("background_fill_secondary", "input_background_fill"),
    ("transparent", "transparent"): ("block_background_fill",),
    ("#3f4551", "#c3c8d2"): ("block_label_text_color",),
    ("#dfe2e8", "#2c313a"): ("border_color_primary", "input_border_color"),
    ("#3b5bdb", "#8aa0ff"): (
        "border_color_accent", "input_border_color_focus", "button_primary_background_fill",
        "checkbox_background_color_selected", "checkbox_border_color_focus", "link_text_color",
    ),
    ("#ffffff", "#0d0f13"): ("input_background_fill_focus",),
    ("#6b7280", "#8b93a1"): ("input_placeholder_color",),
    ("#e9edfc", "#252c47"): ("color_accent_soft",),
    ("#314fc4", "#9db0ff"): ("button_primary_background_fill_hover",),
    ("#ffffff", "#0d1020"): ("button_primary_text_color", "button_primary_text_color_hover"),
    ("#f3f4f7", "#20242c"): ("button_secondary_background_fill_hover",),
}  # fmt: skip
"""(light, dark) -> where it is used. All text has a contrast of 4.5 or more to its background."""


_MEASURES = {
    "block_border_width": "0px", "block_padding": "0px", "block_shadow": "none", "block_radius": "12px",
    "block_title_text_weight": "600", "block_title_text_size": "13px", "block_info_text_size": "12px",
    "input_border_width": "1px", "input_radius": "8px", "input_shadow": "none", "input_shadow_focus": "none",
    "input_padding": "8px 12px", "input_text_size": "14px",
    "button_large_radius": "8px", "button_large_padding": "12px 16px", "button_large_text_size": "15px",
    "button_small_radius": "8px", "button_small_padding": "6px 12px", "button_small_text_size": "13px",
    "button_small_text_weight": "500", "layout_gap": "16px", "section_header_text_size": "14px",
}  # fmt: skip
