"""An erasure LoRA solved in closed form from the text encoder and the model's weights: no training, no evaluation."""
