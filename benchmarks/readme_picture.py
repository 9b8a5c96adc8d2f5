"""README's picture: images per second beside the other runtimes, as an SVG made from results/.

`readme_table.py` writes it. Bars are medians; the same rows give the same file.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fused_resnet.bench.results import Row

#: The panels, in reading order: network and batch.
PANELS = (("resnet18", 1), ("resnet50", 1), ("resnet18", 16), ("resnet50", 16))
#: The providers of a panel and their colours: one colour each, grey for PyTorch's own.
PROVIDERS = {
    "frozen": ("fused_resnet", "#b3261e"),
    "openvino": ("OpenVINO", "#4f7cac"),
    "onnxruntime": ("ONNX Runtime", "#6b8e6b"),
    "ncnn": ("ncnn", "#a58a5f"),
    "compile": ("torch.compile", "#8a8f98"),
    "channels_last": ("PyTorch", "#b4b8bf"),
}
WIDTH, PANEL, BAR, LABEL = 760, 380, 20, 104
HEAD, TITLE, GAP = 44, 30, 18


def picture(rows: Sequence[Row]) -> str:
    """The SVG of one file's rows.

    Args:
        rows: Rows of a file in results/, of one device and number of threads.
    """
    first = rows[0]
    panel_height = TITLE + BAR * len(PROVIDERS) + GAP
    height = HEAD + panel_height * (len(PANELS) // 2)
    caption = (
        f"Images per second, {first['dtype']}, 224x224, {first['threads']} threads of "
        f"{first['device']}; more is better"
    )
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12" '
        'fill="#24292f">',
        f"<title>{escape(caption)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="13">{escape(caption)}</text>',
    ]
    for number, (subject, batch) in enumerate(PANELS):
        left, top = PANEL * (number % 2) + 16, HEAD + panel_height * (number // 2)
        speeds = {
            row["provider"]: row["images_per_s"]
            for row in rows
            if (row["subject"], row["batch"], row["status"]) == (subject, batch, "ok")
        }
        drawn += _panel(f"{subject}, batch {batch}", speeds, left, top)
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _panel(title: str, speeds: dict[str, float], left: int, top: int) -> list[str]:
    drawn = [f'<text x="{left}" y="{top + 18}" font-weight="bold">{escape(title)}</text>']
    room = PANEL - LABEL - 80
    most = max(speeds.values())
    known = sorted((name for name in PROVIDERS if name in speeds), key=lambda n: -speeds[n])
    for line, name in enumerate(known):
        label, colour = PROVIDERS[name]
        y, width = top + TITLE + BAR * line, room * speeds[name] / most
        weight = ' font-weight="bold"' if name == "frozen" else ""
        start = left + LABEL
        drawn += [
            f'<text x="{start - 8}" y="{y + 11}" text-anchor="end"{weight}>{label}</text>',
            f'<rect x="{start}" y="{y}" width="{width:.1f}" height="14" fill="{colour}"/>',
            f'<text x="{start + width + 6:.1f}" y="{y + 11}"{weight}>{speeds[name]:.1f}</text>',
        ]
    return drawn
