"""Models of open_clip from plain arguments: a CLIP, or its tower of images, own or timm's, read off their modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vitlr.anatomy.mlps import read_mlp
from vitlr.checkpoint.plain_args import Args, plain
from vitlr.errors import InputError
from vitlr.runtime.modules import class_of

_VISUAL, _TIMM, _CLIP, _CUSTOM = "VisionTransformer", "TimmModel", "CLIP", "CustomTextCLIP"
_TOWERS = (_VISUAL, _TIMM)
_CLASSES = {
    "open_clip.transformer.VisionTransformer": _VISUAL,
    "open_clip.timm_model.TimmModel": _TIMM,
    "open_clip.model.CLIP": _CLIP,
    "open_clip.model.CustomTextCLIP": _CUSTOM,
}
_BLOCK = "open_clip.transformer.ResidualAttentionBlock"
_TOWER = {"width", "layers", "mlp_ratio", "ls_init_value", "pool_type", "output_tokens", "act_kwargs", "norm_kwargs"}
_TOWER |= {"final_ln_after_pool"}
_IMAGES = {"head_width", "patch_size", "image_size", "patch_dropout", "no_ln_pre"}
_IMAGES |= {"attentional_pool", "attn_pooler_queries", "attn_pooler_heads", *_TOWER}
_IMAGES |= {"timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"}
_TEXTS = {"context_length", "vocab_size", "heads", "embed_cls", "pad_id", "eos_id", "no_causal_mask", "proj_type"}
_TEXTS |= {"proj_bias", *_TOWER}
_KNOWN = {
    _VISUAL: {"embed_dim", "vision_cfg", "quick_gelu"},
    _CLIP: {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias", "output_dict"},
}
_KNOWN |= {_TIMM: _KNOWN[_VISUAL], _CUSTOM: _KNOWN[_CLIP]}
_INSIDE = {"vision_cfg": _IMAGES, "text_cfg": _TEXTS}


def find(model: nn.Module) -> tuple[str, Args] | None:
    """Class and arguments of a CLIP whose towers are open_clip's own or timm's, or of one for images, or None."""
    name = _CLASSES.get(class_of(model))
    if name is None:
        return None
    visual: Any = model if name in _TOWERS else model.visual
    texts: Any = model.text if name == _CUSTOM else model
    try:
        args = _of_timm(visual) if _CLASSES.get(class_of(visual)) == _TIMM else _own(visual)
        if name not in _TOWERS:
            args["quick_gelu"] = _is_quick(texts)
            args |= {"text_cfg": _texts(texts), "output_dict": model.output_dict}
            args |= {} if model.logit_bias is None else {"init_logit_bias": 0.0}
        return name, check(name, args)
    except (AttributeError, IndexError, InputError, KeyError):  # a tower of another kind
        return None


def check(name: str, args: Mapping[str, Any]) -> Args:
    """The arguments, if they and the class are known and plain. Raises `InputError`."""
    if name not in _KNOWN:
        raise InputError(f"{name[:80]!r} is not a model of open_clip that vitlr rebuilds")
    _check_keys(args, _KNOWN[name])
    for key in _INSIDE.keys() & args.keys():
        if not isinstance(args[key], Mapping):
            raise InputError(f"the model argument {key} is no table")
        _check_keys(args[key], _INSIDE[key])
    checked: Args = plain("configuration", args)
    return checked


def build(name: str, args: Args) -> nn.Module:
    """The model; `InputError` where open_clip is not installed."""
    try:
        import open_clip
    except ImportError as cause:
        raise InputError(
            f"{name} is a model of open_clip, which is not installed: pip install open_clip_torch"
        ) from cause
    if name not in _TOWERS:
        made: nn.Module = getattr(open_clip, name)(**args)
        return made
    texts = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 8, "context_length": 4}  # thrown away
    visual: nn.Module = open_clip.CLIP(**args, text_cfg=texts).visual
    return visual


def _check_keys(args: Mapping[str, Any], known: set[str]) -> None:
    if unknown := args.keys() - known:
        raise InputError(
            f"the model argument {str(min(unknown, key=str))[:80]!r} is not one that vitlr stores in a file"
        )


def _own(visual: Any) -> Args:
    return {"embed_dim": visual.output_dim, "vision_cfg": _images(visual), "quick_gelu": _is_quick(visual)}


def _of_timm(visual: Any) -> Args:
    """A model of timm's as a tower, with a projection of open_clip's behind it; of another head it says nothing."""
    trunk, head = visual.trunk, dict(visual.head.named_children())
    last = head["proj"] if "proj" in head else head["mlp"].fc2
    rates = [module.drop_prob for module in trunk.modules() if type(module).__name__ == "DropPath"]
    images = {
        "image_size": list(visual.image_size),
        "timm_model_name": trunk.pretrained_cfg["architecture"],
        "timm_pool": getattr(trunk, "global_pool", None) or trunk.head.global_pool.pool_type,
        "timm_proj": "linear" if "proj" in head else "mlp",
        "timm_proj_bias": last.bias is not None,
        "timm_drop": head["drop"].p if "drop" in head else head["mlp"].drop1.p,
        "patch_dropout": getattr(getattr(trunk, "patch_drop", None), "prob", 0.0),
    }
    if rates:
        images["timm_drop_path"] = max(rates)
    return {"embed_dim": last.out_features, "vision_cfg": images}


def _images(visual: Any) -> Args:
    args = _tower(visual.transformer, visual.ln_post)
    args |= {
        "head_width": args["width"] // args.pop("heads"),
        "patch_size": visual.conv1.kernel_size[0],
        "image_size": list(visual.image_size),
        "patch_dropout": getattr(visual.patch_dropout, "prob", 0.0),
        "no_ln_pre": type(visual.ln_pre) is nn.Identity,
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
        "output_tokens": visual.output_tokens,
    }
    if visual.attn_pool is not None:
        queries, heads = len(visual.attn_pool.query), visual.attn_pool.attn.num_heads
        args |= {"attentional_pool": visual.attn_pool_type or True}
        args |= {"attn_pooler_queries": queries, "attn_pooler_heads": heads}
    return args


def _texts(texts: Any) -> Args:
    """Of a text tower, or of a CLIP that holds the parts of one."""
    whole = hasattr(texts, "pool_type")
    args = _tower(texts.transformer, texts.ln_final)
    projection = texts.text_projection
    args |= {
        "context_length": texts.context_length,
        "vocab_size": texts.vocab_size,
        "pool_type": texts.pool_type if whole else texts.text_pool_type,
        "eos_id": texts.eos_id if whole else texts.text_eos_id,
        "no_causal_mask": texts.attn_mask is None,
        "proj_type": "none" if projection is None else "linear",
        "proj_bias": isinstance(projection, nn.Module),
    }
    if whole:
        args |= {"pad_id": texts.pad_id, "embed_cls": texts.cls_emb is not None, "output_tokens": texts.output_tokens}
    return args


def _tower(transformer: Any, norm: Any) -> Args:
    """What a stack of blocks is made from, from the first of them."""
    block = transformer.resblocks[0]
    if class_of(block) != _BLOCK:
        raise InputError("its blocks are of another kind")
    hidden, act = read_mlp(block.mlp).full_width, block.mlp.gelu
    ratio = hidden / transformer.width
    args = {
        "width": transformer.width,
        "layers": transformer.layers,
        "heads": block.attn.num_heads,
        "mlp_ratio": ratio if int(transformer.width * ratio) == hidden else (hidden + 0.5) / transformer.width,
    }
    if hasattr(block.ls_1, "gamma"):
        args["ls_init_value"] = 1.0  # the values themselves are part of the state
    if getattr(act, "approximate", "none") != "none":
        args["act_kwargs"] = {"approximate": act.approximate}
    if norm.eps != nn.LayerNorm(1).eps:
        args["norm_kwargs"] = {"eps": norm.eps}
    return args


def _is_quick(tower: Any) -> bool:
    return type(tower.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
