"""Python runs this at its start where the folder is on PYTHONPATH, as it is in processes that a standing-in one starts.

It waits until somebody asks for peft, so that processes which never do import nothing.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path


class Waiting:
    """Lets Veneer stand in at the first question about peft."""

    def wake(self) -> None:
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        from veneer.peft import enable

        enable()

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != "peft" and not name.startswith("peft."):
            return None
        self.wake()
        return importlib.util.find_spec(name)

    def find_distributions(self, context: object = None) -> object:
        name = getattr(context, "name", None)
        if name is None or name.lower() != "peft":
            return iter(())
        self.wake()
        from veneer.peft.standin import Finder

        return Finder().find_distributions(context)


if os.environ.get("VENEER_STANDS_IN_FOR_PEFT") == "1":
    sys.meta_path.insert(0, Waiting())  # type: ignore[arg-type]

# The one that would have been found without this folder.
HERE = str(Path(__file__).parent)
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if p != HERE])
if _spec is not None and _spec.loader is not None:
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
