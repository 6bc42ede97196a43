"""The Gradio app: one prompt, a base and its adapters side by side (docs/app.md)."""
