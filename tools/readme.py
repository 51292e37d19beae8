"""Write README.md from the home page's notebook: `python tools/readme.py [--check]`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE, TARGET = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
LINK = re.compile(r"\]\((?!https?:|#)([^)]+\.ipynb)(#[^)]*)?\)")


def shown(cell: dict) -> list[str]:
    """A code cell and its outputs as fenced blocks; a hidden one as nothing."""
    text = "".join(cell["source"])
    if text.startswith("#| hide\n"):
        return []
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#|"))
    outputs = ["".join(output.get("data", {}).get("text/plain", "")) for output in cell["outputs"]]
    return [f"```python\n{code}\n```", *(f"```\n{output}\n```" for output in outputs if output)]


def readme() -> str:
    """The home page as Markdown; links to notebooks lead into nbs/."""
    parts = []
    for cell in json.loads(SOURCE.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts += shown(cell) if cell["cell_type"] == "code" else [LINK.sub(lambda match: f"](nbs/{match[1]}{match[2] or ''})", text)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == readme() else "README.md is not what nbs/index.ipynb says: run `python tools/readme.py`.")
    TARGET.write_text(readme(), encoding="utf-8")
