"""peft.auto."""

from ..model import AutoPeftModel as AutoPeftModel
from ..model import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from ..model import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from ..model import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from ..model import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from ..model import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from ..model import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
