"""A synthetic folder of a training run, and a browser client."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cpo_fast.data.labels import answer, thought
from cpo_fast.evaluation.preference import summarize_likelihood, summarize_preference
from cpo_fast.evaluation.summary import build_summary, write_examples

HOSTILE = '</p><script>alert("x")</script><img src="https://example.org/a.png" onerror=boom()>&amp;'
NAMES = ("Pleural Effusion", "Atelectasis", "Cardiomegaly", "Edema", "Pneumothorax", "Pneumonia")
REPORT = (
    "FINDINGS: The cardiac silhouette is mildly enlarged. There is a small right pleural effusion "
    "with blunting of the costophrenic angle. No pneumothorax is seen.\n\n"
    "IMPRESSION: Small right pleural effusion. Mild cardiomegaly."
)
EDITED = (
    "FINDINGS: The cardiac silhouette is mildly enlarged. There is a visceral pleural line with "
    "absent lung markings at the right apex. The costophrenic angles are sharp.\n\n"
    "IMPRESSION: Right apical pneumothorax. Mild cardiomegaly."
)


def write_run(folder: Path, *, seed: int = 0, report: str = REPORT, steps: int = 150) -> Path:
    """Write every file of a finished run, with plausible figures and synthetic texts."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    _json(folder / "config.json", _config(seed))
    _json(folder / "summary.json", _summary(rng, steps))
    rows = list(_metrics(rng, steps))
    _lines(folder / "metrics.jsonl", rows)
    _lines(
        folder / "counterfactuals.jsonl",
        [{"study_id": f"5{i:07}", "target": rng.choice(NAMES)} for i in range(300)],
    )
    rejected = {"file": "files/p10/s50000003.txt", "line": None, "id": "50000003"}
    detail = {"reason": "no-findings-or-impression", "detail": "3 sections, none of the two"}
    _lines(folder / "rejected_records.jsonl", [rejected | detail])
    _radiograph(folder / "image.png")
    both = ("Cardiomegaly", "Pleural Effusion")
    answers = {
        "untrained": "lung the the of </think> no",
        "sft": thought(report, ("Cardiomegaly",)),
        "cpo": thought(report, both),
    }
    example = {
        "study_id": "50000001",
        "image": "image.png",
        "report": report,
        "labels": list(both),
        "counterfactual": EDITED,
        "target": "Pneumothorax",
        "answers": answers,
    }
    missing = example | {"study_id": HOSTILE, "image": "gone.png", "counterfactual": None}
    write_examples(folder, [example, missing], [_drift(report)])
    return folder


def _drift(report: str) -> dict[str, Any]:
    """A probed study whose tokens are the words of `report` and one unbreakable token."""
    tokens = [f" {word}" for word in report.split()] + [" " + "x" * 120]
    moves = [abs(math.sin(i)) / 2 for i in range(len(tokens))]
    swap = {"before": "small " + "y" * 90, "after": "large", "variation": 0.2, "divergence": 0.1}
    z = [1 / len(NAMES)] * len(NAMES)
    kinds = ("synonym", "side", "negation", "hallmark")
    return {
        "model": "cpo",
        "study_id": "50000001",
        "tokens": tokens,
        "variation": moves,
        "divergence": [move / 2 for move in moves],
        "findings": list(NAMES),
        "start": z,
        "end": z,
        "swaps": [swap | {"kind": kind, "distribution": z} for kind in kinds],
    }


def _config(seed: int) -> dict[str, Any]:
    path = "/data/" + "very_long_folder_name_without_any_break_" * 3
    long = {"model_name_or_path": "tiny", "dataset": path, "lora_target_modules": ["q", "k", "v"]}
    numbers = {"seed": 42 + seed, "beta": 0.1, "learning_rate": 2e-4, "max_steps": -1}
    return {**long, **numbers, "image_root": None, "bf16": False, "packing": {"length": 4096}}


def _metrics(rng: random.Random, steps: int) -> Any:
    for step in range(1, steps + 1):
        common = {"step": step, "epoch": step / steps, "tokens_per_second_per_gpu": 9000.0}
        rate = 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        noise = rng.gauss(0, 0.08)
        yield {
            "stage": "sft",
            **common,
            "loss": 0.6 + 5 * math.exp(-step / 25) + noise,
            "grad_norm": math.exp(noise) + 3 / step,
            "learning_rate": rate,
        }
    for step in range(1, steps + 1):
        gap = 4 * (1 - math.exp(-step / 40)) + rng.gauss(0, 0.3)
        row: dict[str, Any] = {"stage": "cpo", "step": step, "epoch": step / steps}
        row |= {
            "loss": math.log1p(math.exp(-gap)),
            "grad_norm": 2 * math.exp(-gap / 3 + rng.gauss(0, 0.2)),
            "learning_rate": 2e-4 * (1 + math.cos(math.pi * step / steps)) / 2,
            "rewards/chosen": 0.3 * gap,
            "rewards/rejected": -0.7 * gap,
            "rewards/margins": gap,
            "rewards/accuracies": min(1.0, 0.5 + gap / 6),
            "logps/chosen": -60 + gap,
            "logps/rejected": -62 - 3 * gap,
            "pairs_per_second": 21.0,
        }
        yield row
        if step % 30 == 0:
            held_out = {"loss": 1.1 * row["loss"], "rewards/margins": 0.9 * gap}
            held_out["rewards/accuracies"] = 0.95 * row["rewards/accuracies"]
            at = {key: row[key] for key in ("stage", "step", "epoch")}
            yield at | {f"eval_{key}": value for key, value in held_out.items()}


def _summary(rng: random.Random, steps: int) -> dict[str, Any]:
    shares = (0.45, 0.3, 0.25, 0.15, 0.08, 0.12)

    def draw() -> tuple[str, ...]:
        found = tuple(n for n, s in zip(NAMES, shares, strict=True) if rng.random() < s)
        return found or ("No Finding",)

    truth = [draw() for _ in range(200)]
    reports = [f"the heart and {' '.join(names).lower()} are seen today" for names in truth]

    def answer_all(right: float) -> list[str]:
        return [
            thought(text, names) if rng.random() < right else answer(draw())
            for text, names in zip(reports, truth, strict=True)
        ]

    pairs = [[rng.gauss(mean, 3) for _ in range(160)] for mean in (-58, -75, -60, -62)]
    speed = {"pairs_per_second": 21.4, "logical_tokens_per_second": 24810.2}
    sft = {"steps": steps, "seconds": 71.2, "physical_tokens_per_second": 9120.0}
    sft["pairs_per_second"] = 40.3
    cpo = {"steps": steps, "seconds": 92.8, "physical_tokens_per_second": 9630.0, **speed}
    cpo["time"] = {"policy forward": 22.0, "reference": 18.5, "backward": 38.0, "data": 3.1}
    return {
        "stages": {"sft": sft, "cpo": cpo, "evaluate": {"seconds": 18.0}},
        "evaluation": build_summary(
            truth=truth,
            training_truth=[draw() for _ in range(300)],
            answers={"untrained": ["?"] * 200, "sft": answer_all(0.7), "cpo": answer_all(0.85)},
            reports=reports,
            preference={
                "cpo": summarize_preference(*pairs, beta=0.1),
                "sft": summarize_likelihood(*pairs[2:]),
            },
            bootstrap=200,
        ),
        "data": {
            "read": 2000,
            "used": 1988,
            "rejected": {"no-findings-or-impression": 9, "image-unreadable": 3},
            "trained_on": {"sft": 1600, "cpo": 1590},
            "held_out": {"sft": 388, "cpo": 381},
        },
        "hardware": {"device": "Some GPU", "processes": 2},
        "versions": {"cpo_fast": "0.1.0", "torch": "2.13.0", "commit": "0123456789abcdef"},
    }


def _radiograph(path: Path) -> None:
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    lungs = np.exp(-(((np.abs(x) - 0.45) / 0.3) ** 4) - (y / 0.7) ** 4)
    Image.fromarray((200 - 150 * lungs).astype(np.uint8)).save(path)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Browser:
    """Headless Chromium, controlled over its debugging pipe: no port, no network."""

    PATH = shutil.which("chromium") or shutil.which("google-chrome")

    def __init__(self, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
            "--disable-background-networking --disable-component-update --disable-sync "
            "--hide-scrollbars --remote-debugging-pipe"
        )

        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
        # The browser reads from file descriptor 3 and writes to 4.
        place = "import os, sys; a, b = map(int, sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4)"
        command = [str(self.PATH), *flags.split(), f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{place}; os.execv(sys.argv[3], sys.argv[3:])",
             *map(str, ends), *command],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for end in ends:
            os.close(end)
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._buffer, self.events = 0, b"", list[dict[str, Any]]()
        targets = self._ask("Target.getTargets", session=None)["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = {"targetId": page["targetId"], "flatten": True}
        self._session = self._ask("Target.attachToTarget", session=None, **attached)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._ask(method, session=self._session, **parameters)

    def open(self, url: str, width: int, *, dark: bool = False) -> None:
        """Load `url` at a width in CSS pixels; `events` then has the events since this call."""
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        os.close(self._out)
        os.close(self._in)

    def _ask(self, method: str, session: str | None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (reply := self._receive()).get("id") != self._number:
            pass
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def _receive(self, timeout: float = 30) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("the browser did not answer")
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message
