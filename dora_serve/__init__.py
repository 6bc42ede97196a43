"""One base model, many adapters: LoRA and DoRA merged exactly, verified, and served."""

__version__ = "0.1.0"
