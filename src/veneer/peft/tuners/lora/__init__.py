"""peft.tuners.lora."""

from ....methods.lora import LoraConfig as LoraConfig
from ..tuners_utils import LoraModel as LoraModel
from .layer import Conv1d as Conv1d
from .layer import Conv2d as Conv2d
from .layer import Conv3d as Conv3d
from .layer import Embedding as Embedding
from .layer import Linear as Linear
from .layer import LoraLayer as LoraLayer
