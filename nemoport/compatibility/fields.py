"""Fields of Triton's config that an older release refuses: it reads no config with a field that it does not know.

Since when each field is there, from protobuf/model_config.proto of the release branches r20.10 to r26.07 of
triton-inference-server/common. What is not listed is older than all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

FIELDS: Mapping[str, str] = {
    "ModelInstanceGroup.host_policy": "21.06",
    "ModelInstanceGroup.passive": "21.06",
    "ModelInstanceGroup.secondary_devices": "21.06",
    "ModelSequenceBatching.Control.bool_false_true": "21.09",
    "ModelConfig.response_cache": "21.10",
    "ModelSequenceBatching.state": "21.11",
    "ModelInput.optional": "22.01",
    "ModelSequenceBatching.State.initial_state": "22.01",
    "ModelWarmup.count": "22.07",
    "ModelEnsembling.Step.model_namespace": "23.03",
    "ModelSequenceBatching.StrategyOldest.preserve_ordering": "23.08",
    "ModelSequenceBatching.State.use_growable_memory": "23.11",
    "ModelSequenceBatching.State.use_same_buffer_for_input_output": "23.11",
    "ModelSequenceBatching.iterative_sequence": "23.11",
    "ModelConfig.runtime": "24.01",
    "ModelInput.is_non_linear_format_io": "24.08",
    "ModelOutput.is_non_linear_format_io": "24.08",
    "ModelConfig.model_metrics": "24.11",
    "ModelEnsembling.max_inflight_requests": "25.11",
}
VALUES: Mapping[str, str] = {
    "BATCH_ITEM_SHAPE": "22.03",
    "BATCH_ITEM_SHAPE_FLATTEN": "22.03",
    "TYPE_BF16": "22.05",
}
"""Of enumerations."""

PLATFORMS: Mapping[str, str] = {"torch_aoti": "26.03"}
"""From https://github.com/triton-inference-server/pytorch_backend#aot-inductor-support-beta."""
