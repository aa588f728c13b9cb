"""peft.tuners.oft."""

from ....methods.oft import OFTConfig as OFTConfig
from ..tuners_utils import OFTModel as OFTModel
from .layer import OFTLayer as OFTLayer
