"""Base and adapted predictions of one denoising step, blended row by row."""
