"""What a run will need, counted before anything is loaded: parameters, memory of device and host, what would fit.

The model is built on the meta device, where tensors have shapes and no bytes, and adapted as it would be for real. One
step runs there too, forward and backward, while a ledger of all storages finds the peak, so that no formula for an
architecture is needed. Process layouts are added to that from what the libraries allocate.

The package may import model and everything below it.
"""

from .estimate import Plan, plan
from .layout import Part, Peak
from .settings import Settings, size

__all__ = ["Part", "Peak", "Plan", "Settings", "plan", "size"]
