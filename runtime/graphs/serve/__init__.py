"""A model served from static graphs: which capture serves a call, replay source, reports. Entry point: `model.CapturedModel`."""
