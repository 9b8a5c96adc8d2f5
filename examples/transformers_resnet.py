"""A ResNet of transformers, frozen, behind the interface that its pipelines call.

pip install transformers
python transformers_resnet.py
"""

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import fused_resnet as fr


def main() -> None:
    # ResNetForImageClassification.from_pretrained("microsoft/resnet-50") downloads trained weights.
    config = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    model = ResNetForImageClassification(config).eval()
    frozen = fr.freeze(model)
    print(fr.report(frozen).summary())

    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        result = frozen(pixel_values=pixel_values)
        expected = model(pixel_values=pixel_values)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-3, atol=1e-4)
    label = int(result.logits[0].argmax())
    print(f"{type(result).__name__}: {model.config.id2label[label]}")


if __name__ == "__main__":
    main()
