"""peft.tuners.ia3."""

from ....methods.ia3 import IA3Config as IA3Config
from ..tuners_utils import IA3Model as IA3Model
from .layer import IA3Layer as IA3Layer
