"""peft.peft_model."""

from .models import PeftMixedModel as PeftMixedModel
from .models import PeftModel as PeftModel
from .models import PeftModelForCausalLM as PeftModelForCausalLM
from .models import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from .models import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from .models import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from .models import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from .models import PeftModelForTokenClassification as PeftModelForTokenClassification
