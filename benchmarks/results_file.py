"""Where benchmarks write what they measured, and with what."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def save(method: str, part: str, result: dict[str, Any], packages: Sequence[str]) -> None:
    """Write one part of a method's results file and print it; the other parts stay as they are."""
    path = FOLDER / f"{method}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[part] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("lightning-iclr", "torch", "lightning", "numpy", *packages)},
        **result,
    }
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({k: v for k, v in results[part].items() if k != "runs"}, indent=2))
