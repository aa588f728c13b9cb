"""peft.tuners.loha."""

from ....methods.loha import LoHaConfig as LoHaConfig
from ..tuners_utils import LoHaModel as LoHaModel
from .layer import LoHaLayer as LoHaLayer
