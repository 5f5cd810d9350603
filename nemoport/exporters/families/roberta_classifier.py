"""RoBERTa and XLM-R as classifiers or rerankers: BERT's head under names of its own."""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.dialects.encoders import LABELS, ROBERTA, bert
from nemoport.exporters.families.bert import BUFFERS, names
from nemoport.exporters.families.bert_classifier import HEAD, LOADS
from nemoport.exporters.rules import Column

COLUMNS = {
    "huggingface": Column(
        rules=(
            *names("roberta."),
            *naming.rules({"classifier.dense.*": "pooler.*", "classifier.out_proj.*": "head.*"}),
        ),
        dialects=(
            bert("roberta", ("RobertaForSequenceClassification",), LABELS, kind=ROBERTA, fixed=HEAD),
            bert("xlm-roberta", ("XLMRobertaForSequenceClassification",), LABELS, kind=ROBERTA, fixed=HEAD),
        ),
        buffers=BUFFERS,
        loads=LOADS,
    ),
}
