"""Prefix encoders: what makes the prefix of collaborative information, pluggable by name."""

from .base import Prefix, PrefixEncoder
from .linear import LinearEncoder
from .mformer import MFormer
from .registry import build_prefix_encoder, prefix_encoder_class, prefix_encoders, register_prefix_encoder
from .static import NoPrefix, StaticPrefix

__all__ = [
    "LinearEncoder",
    "MFormer",
    "NoPrefix",
    "Prefix",
    "PrefixEncoder",
    "StaticPrefix",
    "build_prefix_encoder",
    "prefix_encoder_class",
    "prefix_encoders",
    "register_prefix_encoder",
]
