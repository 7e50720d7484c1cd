"""Weight files of any container, opened as a `Source`: a checked header, and tensors on request."""

from lora_convert.containers.header import MAX_HEADER, Header, Span, TensorInfo
from lora_convert.containers.source import Source, Target, name_of, open_source, opened

__all__ = ["MAX_HEADER", "Header", "Source", "Span", "Target", "TensorInfo", "name_of", "open_source", "opened"]
