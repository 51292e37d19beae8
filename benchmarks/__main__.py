"""`python -m benchmarks [name …]`: run all benchmarks, or those named."""

import sys
from importlib import import_module
from pathlib import Path

HELPERS = {"__init__", "__main__", "measure"}
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in HELPERS)

if unknown := set(sys.argv[1:]) - set(NAMES):
    sys.exit(f"there is no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
for name in sys.argv[1:] or NAMES:
    print(f"== {name}")
    import_module(f"benchmarks.{name}").main()
