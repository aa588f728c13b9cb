"""peft.tuners.vera."""

from ....methods.vera import VeraConfig as VeraConfig
from ..tuners_utils import VeraModel as VeraModel
from .layer import VeraLayer as VeraLayer
