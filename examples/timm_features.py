"""Feature maps of a timm ResNet, frozen: for a detector, a segmentation head or an index of images.

pip install timm
python timm_features.py
"""

import timm
import torch

import fused_resnet as fr


def main() -> None:
    # pretrained=True downloads trained weights, once.
    model = timm.create_model("resnet18", pretrained=False, features_only=True).eval()
    frozen = fr.freeze(model)
    print(fr.report(frozen).summary())

    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        maps, expected = frozen(images), model(images)
    for one, other, channels in zip(maps, expected, model.feature_info.channels(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        print(f"{channels} channels: {tuple(one.shape)}")


if __name__ == "__main__":
    main()
