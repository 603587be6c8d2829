"""Dynamic memory compression: a KV cache that learns which tokens share a slot (arXiv 2403.09636)."""

from nestling.dmc.calibrate import Calibrated, calibrate
from nestling.dmc.convert import convert, free, is_converted
from nestling.dmc.measure import Compression, measure
from nestling.dmc.register import register
from nestling.dmc.retrofit import retrofit
from nestling.dmc.runtime.gates import Gates
from nestling.dmc.runtime.modeling import recording
from nestling.dmc.runtime.slots import SlotLayer
from nestling.dmc.settings import RetrofitSettings
from nestling.dmc.store import cache_bytes, load_cache, save_cache, slot_layers

register()

__all__ = [
    "Calibrated",
    "Compression",
    "Gates",
    "RetrofitSettings",
    "SlotLayer",
    "cache_bytes",
    "calibrate",
    "convert",
    "free",
    "is_converted",
    "load_cache",
    "measure",
    "recording",
    "retrofit",
    "save_cache",
    "slot_layers",
]
