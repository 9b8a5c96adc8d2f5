"""A detector of torchvision with a frozen backbone: pyramid and heads stay PyTorch's own modules.

python torchvision_detection.py
"""

import torch
import torchvision

import fused_resnet as fr


def main() -> None:
    # weights="DEFAULT" in place of the two arguments downloads the trained detector.
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=128, max_size=160
    ).eval()
    images = [torch.rand(3, 96, 128), torch.rand(3, 120, 100)]
    with torch.inference_mode():
        batch = detector.transform(images)[0].tensors
        expected = detector.backbone(batch)

        detector.backbone.body = fr.freeze(detector.backbone.body)
        print(fr.report(detector.backbone.body).summary())
        maps = detector.backbone(batch)
        found = detector(images)
    for name, one in maps.items():
        error = float((one - expected[name]).norm() / expected[name].norm())
        assert error < 1e-5
        print(f"level {name}: {tuple(one.shape)}")
    print(f"{len(found)} images, boxes {[len(one['boxes']) for one in found]}")


if __name__ == "__main__":
    main()
