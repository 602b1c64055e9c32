"""An erasure LoRA trained on a model as the host has it loaded: precision, other LoRAs and all."""
