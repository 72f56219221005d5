"""The lab: recipes, tasks, trainings, searches, comparisons, advice; `import surgical_peft` brings in none of it."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import SurgicalError

_NEEDED = ("datasets", "evaluate", "matplotlib", "PIL", "psutil", "yaml")
if missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise SurgicalError(f"recipes need {', '.join(missing)}, not installed: pip install 'surgical-peft[experiments]'.")
