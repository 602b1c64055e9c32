"""Sizes that the seed file and the networks share."""

NARROW_WIDTH, WIDE_WIDTH = 64, 320
"""Channels of the UNet: while training, and as shipped to ComfyUI."""

TEXT_WIDTH = 768
TEXT_LAYERS = 2
TEXT_MLP_WIDTH = 128
VOCABULARY = 49408
"""CLIP-L's width and vocabulary, and what the two working layers of the text encoder have."""

LATENT_CHANNELS = 4
TAESD_WIDTH = 64
"""Of the autoencoder: channels of a latent, and hidden channels of TAESD, to which the slim widths are padded."""
