"""Tile towers of timm inside OpenCLIP models: `timm:NAME`, and repositories of the Hugging Face hub or folders without an OpenCLIP part.

OpenCLIP's own timm tower holds them; what they need comes from the repository's config.json, or, where that leaves something out, from
`KNOWN`. A tile has no margin to cut off, so timm's `crop_pct` is taken as 1.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .common import ModelError

CONFIG = "open_clip_config.json"  # of a folder or repository that OpenCLIP loads
CLASS_AND_PATCHES = "class+patches"  # a feature: the class token beside the mean of the patch tokens
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
OPTIMUS = {"init_values": 1e-5, "dynamic_img_size": False, "mean": [0.707223, 0.578729, 0.703617], "std": [0.211883, 0.230117, 0.177517]}
UNI2 = {"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536, "mlp_ratio": 5.33334}
KNOWN: dict[str, dict[str, Any]] = {
    "UNI": {"init_values": 1e-5, "dynamic_img_size": True},
    "UNI2-h": UNI2 | SWIGLU | {"no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True},
    "Virchow": SWIGLU | {"global_pool": CLASS_AND_PATCHES},
    "Virchow2": SWIGLU | {"global_pool": CLASS_AND_PATCHES},
    "H-optimus-0": OPTIMUS,
    "H-optimus-1": OPTIMUS,
    "H0-mini": SWIGLU | {"global_pool": "token"},
}
"""Repository, or folder of that name -> what its card (huggingface.co/ORG/NAME) says beside config.json: timm's arguments, mean, std."""
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2}
"""OpenCLIP's models have a text tower: a small one, with random weights."""

FAMILIES = (
    ("timm:vit_small_patch16_224.dino", 384, 224, 21.7, "Apache-2.0"),
    ("timm:vit_small_patch14_dinov2.lvd142m", 384, 518, 22.1, "Apache-2.0"),
    ("timm:resnet50.a1_in1k", 2048, 224, 23.5, "Apache-2.0"),
    ("hf-hub:MahmoodLab/UNI", 1024, 224, 303.4, "CC-BY-NC-ND-4.0, gated"),
    ("hf-hub:MahmoodLab/UNI2-h", 1536, 224, 681.4, "CC-BY-NC-ND-4.0, gated"),
    ("hf-hub:paige-ai/Virchow2", 2560, 224, 631.2, "CC-BY-NC-ND-4.0, gated"),
    ("hf-hub:bioptimus/H-optimus-0", 1536, 224, 1134.8, "Apache-2.0"),
    ("hf-hub:prov-gigapath/prov-gigapath", 1536, 224, 1134.9, "Apache-2.0, gated"),
    ("hf-hub:1aurent/vit_base_patch16_224.owkin_pancancer", 768, 224, 85.8, "Owkin's non-commercial (Phikon)"),
)
"""Tile towers that people ask for: name, width D, input edge (px), parameters (millions), licence of the weights."""


class _ClassAndPatches(VisionTransformer):
    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(1)], dim=1)


def find_timm(name: str) -> tuple[str, str, dict[str, Any]] | None:
    """What timm builds a name from: (its source, with the weights; architecture; arguments). None: a name that OpenCLIP knows by itself.

    Raises ModelError: a repository or folder of neither; errors of the hub where a download fails.
    """
    schema, _, rest = name.partition(":")
    if schema == "timm":
        return rest, rest.split(".")[0], {}
    if schema == "local-dir":
        ours, config = Path(rest) / CONFIG, Path(rest) / "config.json"
        if ours.exists() or not config.exists():
            return None
    elif schema == "hf-hub":
        try:
            hf_hub_download(repo_id=rest, filename=CONFIG)
            return None
        except EntryNotFoundError:
            config = Path(hf_hub_download(repo_id=rest, filename="config.json"))
    else:
        return None
    there = json.loads(config.read_text(encoding="utf-8"))
    if "architecture" not in there:
        raise ModelError(f"{name} is a model of neither OpenCLIP nor timm; Phikon is hf-hub:1aurent/vit_base_patch16_224.owkin_pancancer")
    return name, there["architecture"], there.get("model_args", {}) | KNOWN.get(Path(rest).name, {})


def build_trunk(source: str, args: dict[str, Any], **weights: Any) -> nn.Module:
    """timm's tower without a classifier; `weights` are timm's arguments that say which to load."""
    args = {key: getattr(timm.layers, value) if key == "mlp_layer" else value for key, value in args.items()}
    both = args.get("global_pool") == CLASS_AND_PATCHES
    trunk = timm.create_model(source, **(args | weights | {"num_classes": 0} | ({"global_pool": "token"} if both else {})))
    if both:
        trunk.__class__ = _ClassAndPatches
    return trunk


def from_timm(source: str, architecture: str, args: dict, *, pretrained: bool, file: str | None) -> tuple[open_clip.CLIP, dict]:
    """An OpenCLIP model around timm's tower, and its configuration; its `visual.timm_args` are what OpenCLIP has no place for.

    Args:
        pretrained: load weights: those of `file`, else those of the source.

    Raises ModelError: a tower that gives no vector; errors of timm and the hub.
    """
    stain = {key: args[key] for key in ("mean", "std") if key in args}
    args = {key: value for key, value in args.items() if key not in stain}
    chosen = {"pretrained_cfg_overlay": {"file": file, "custom_load": file.endswith(".npz")}} if file else {}
    trunk = build_trunk(source, args, pretrained=pretrained, **chosen)
    data, fixed = timm.data.resolve_model_data_config(trunk), getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    edge = (fixed or data["input_size"])[-1]
    with torch.no_grad():
        shape = trunk.eval()(torch.zeros(1, 3, edge, edge, device=next(trunk.parameters()).device)).shape
    if len(shape) != 2:
        raise ModelError(f"{source}: this tower gives features of shape {tuple(shape[1:])} for a tile, not a vector")
    pool = getattr(trunk, "global_pool", None) or getattr(getattr(trunk, "head", None), "global_pool", None)
    vision = {"timm_model_name": architecture, "timm_pool": pool if isinstance(pool, str) else getattr(pool, "pool_type", "avg")}
    cfg = {"embed_dim": shape[1], "vision_cfg": vision | {"timm_proj": "none", "image_size": edge}, "text_cfg": TEXT}
    preprocess = {key: data[key] for key in ("mean", "std", "interpolation")} | stain
    return _hold(trunk, args, cfg, preprocess), cfg


def load_held(folder: Path) -> tuple[open_clip.CLIP, dict[str, Any]] | None:
    """As `from_timm`, of a folder that was saved with such arguments; None: OpenCLIP can load it, or says what is wrong."""
    try:
        there = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        cfg, args = there["model_cfg"], there["timm_args"]
    except (OSError, ValueError, KeyError):
        return None
    clip = _hold(build_trunk(cfg["vision_cfg"]["timm_model_name"], args), args, cfg, there["preprocess_cfg"])
    clip.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    return clip, cfg


def _hold(trunk: nn.Module, args: dict[str, Any], cfg: dict[str, Any], preprocess: dict[str, Any]) -> open_clip.CLIP:
    """OpenCLIP's model of a small tower, with this one, which needs these arguments, in its place."""
    small = cfg["vision_cfg"] | {"timm_model_name": "test_vit", "timm_pool": "token"}
    clip = open_clip.CLIP(cfg["embed_dim"], small, cfg["text_cfg"])
    clip.visual.trunk, clip.visual.timm_args = trunk, args
    whole = open_clip.transform.PreprocessCfg(size=clip.visual.image_size)
    open_clip.model.set_model_preprocess_cfg(clip, whole.__dict__ | preprocess)
    return clip
