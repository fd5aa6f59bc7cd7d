"""What is asked of a clip, and what counts as an answer.

The question follows appendix A.3 of the LDDU paper in its content (which of the given emotions are present, from frames
and transcript), not in its words. The answer must be a JSON list of names and nothing else: whatever has to be guessed
at is wrong.
"""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from uncertainty_mm.lightning import UsageError

Messages = list[dict[str, Any]]  # of the chat-completions protocol

KINDS = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)


class Clip(NamedTuple):
    """What is known of a sample."""

    id: str
    frames: list[Path]  # in order of time
    transcript: str  # "" where there is none


class Clips(NamedTuple):
    """Samples and their labels."""

    clips: list[Clip]
    label_names: list[str]
    labels: Tensor  # (N, Q) of 0 and 1
    unknown: Tensor  # (N, Q) bool


def read_clips(folder: Path) -> Clips:
    """Reads `labels.csv`, and for each of its samples the folder `frames/ID` and the file `transcripts/ID.txt`.

    The first column of `labels.csv` is `id`, the others are labels: 1, 0, or nothing where it is not known. A sample
    may lack frames or a transcript, not both. Frames are `.jpg`, `.png` or `.webp`, in the order of their names.

    Raises:
        UsageError: If something is not as described.
    """
    table = folder / "labels.csv"
    if not table.is_file():
        raise UsageError(f"{table}: no such file")
    with open(table, newline="", encoding="utf-8-sig") as file:
        header, *rows = [*csv.reader(file)] or [[]]
    rows = [row for row in rows if row]
    names = header[1:]
    if header[:1] != ["id"] or not names or "" in names or len({*names}) < len(names):
        raise UsageError(f"{table}: the header must be `id` and names of labels, not {header}")
    if not rows or len({row[0] for row in rows}) < len(rows):
        raise UsageError(f"{table}: must hold at least one sample, and none twice")
    values = {"0": 0.0, "1": 1.0, "": np.nan}
    labels, clips = [], []
    for name, *cells in rows:
        if len(cells) != len(names) or not {*cells} <= values.keys():
            raise UsageError(f"{table}: {name}: expected {len(names)} of 0, 1 or nothing: {cells}")
        if Path(name).name != name or name == "..":
            raise UsageError(f"{table}: {name!r} cannot be the name of a file")
        labels.append([values[cell] for cell in cells])
        text = folder / "transcripts" / f"{name}.txt"
        transcript = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        found = (folder / "frames" / name).glob("*")
        frames = sorted(path for path in found if path.suffix.lower() in KINDS)
        if not frames and not transcript:
            raise UsageError(f"{folder}: {name} has neither frames nor a transcript")
        clips.append(Clip(name, frames, transcript))
    array = torch.tensor(labels)
    return Clips(clips, names, array.nan_to_num(0), array.isnan())


def question(clip: Clip, label_names: Sequence[str], most_frames: int) -> Messages:
    """The message that asks for the emotions of a clip, with at most so many of its frames, evenly spaced."""
    count = min(most_frames, len(clip.frames))
    chosen = np.linspace(0, len(clip.frames) - 1, count).round().astype(int)
    lines = ["Someone speaks in a short video."]
    if count:
        lines.append("The pictures are frames of it, in the order of time.")
    if clip.transcript:
        lines.append(f"This is said:\n<transcript>\n{clip.transcript}\n</transcript>")
    lines.append(
        f"Which of these emotions does the speaker show? {', '.join(label_names)}. Several may be present at once, or "
        "none. Answer with a JSON list of the names of those present, written exactly as here, [] if none is, and "
        "nothing else."
    )
    content: list[dict[str, Any]] = [{"type": "text", "text": "\n".join(lines)}]
    for index in chosen:
        path = clip.frames[index]
        data = base64.b64encode(path.read_bytes()).decode()
        url = f"data:image/{KINDS[path.suffix.lower()]};base64,{data}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]


def parse(answer: str, label_names: Sequence[str]) -> list[str] | None:
    """The labels of an answer, a JSON list of some of the names, in a code fence or not; None of any other answer.

    Example:
        >>> parse('["sad", "fear"]', ["happy", "sad", "fear"])
        ['sad', 'fear']
        >>> parse("The speaker is sad.", ["happy", "sad", "fear"])
    """
    text = answer.strip()
    if fenced := FENCE.fullmatch(text):
        text = fenced[1]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        return None
    known = set(found) <= set(label_names) and len(set(found)) == len(found)
    return found if known else None
