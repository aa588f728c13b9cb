"""peft.auto."""

from ..model.auto import AutoPeftModel as AutoPeftModel
from ..model.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from ..model.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from ..model.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from ..model.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from ..model.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from ..model.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
