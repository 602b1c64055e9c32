"""The bridge to ComfyUI: the only code that touches the host's internals. It knows no node and no widget."""
