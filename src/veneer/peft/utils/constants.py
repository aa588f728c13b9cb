"""peft.utils.constants."""

from ...io import locate

CONFIG_NAME = locate.CONFIG_NAME
SAFETENSORS_WEIGHTS_NAME = locate.WEIGHTS_NAME
WEIGHTS_NAME = "adapter_model.bin"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
DUMMY_TARGET_MODULES = "dummy-target-modules"
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
