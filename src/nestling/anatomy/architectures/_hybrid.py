"""What Bamba and the hybrids made after it have in common: Mamba-2 and attention under their names, a gated MLP.

Letters are those of `_dense.py` and `_mamba2.py`. Which of mixer and attention a layer has, each architecture declares.
"""

from nestling.anatomy.architectures import _dense, _mamba2

HEADS = ("mamba_n_heads", "mamba_d_head", "mamba_d_state")
MIXER_AXES = _mamba2.axes("mamba", *HEADS)
AXES = (
    *_dense.axes("self_attn.q_proj", "feed_forward.gate_proj", "mamba.in_proj", down="feed_forward.down_proj"),
    *MIXER_AXES,
)
SIZES = _dense.SIZES | {"g": "mamba_n_groups", "k": "mamba_d_conv"}

MODEL = {name.replace(".norm.", ".final_layernorm."): spec for name, spec in _dense.MODEL.items()}

ATTENTION = _dense.ATTENTION | _dense.ATTENTION_BIAS
MIXER = _mamba2.tensors("mamba")
BLOCKS = {
    "norms": {"input_layernorm.weight": "hidden", "pre_ff_layernorm.weight": "hidden"},
    "attention": ATTENTION,
    "mamba": MIXER,
    "mlp": {name.replace("mlp.", "feed_forward."): spec for name, spec in (_dense.MLP | _dense.MLP_BIAS).items()},
}

STATE = {"mamba": _mamba2.STATE}
RECENT = {"mamba": _mamba2.RECENT}
INNER_NORMS = ("mamba.norm",)
STRIDES = {"mamba.in_proj.weight": _mamba2.ALIGNED}
EXPAND = {"mamba_expand": _mamba2.expand("mamba_n_heads", "mamba_d_head")}
